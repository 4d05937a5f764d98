"""Examples: lists of numbers, which can be laid down as bytes and taken up again."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Example:
    """What a task learns from at once. Its fields are lists of integers, or of floats.

    Class attributes:
        floats: names of the fields that hold floats.
    """

    floats: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        """Tokens of its longest row."""
        return max(len(each) for each in self._lists())

    def pack(self) -> bytes:
        """All of it, four bytes an integer and eight a float."""
        lists = self._lists()
        head = array("i", map(len, lists)).tobytes()
        codes = zip(self._codes(), lists, strict=True)
        return head + b"".join(array(code, each).tobytes() for code, each in codes)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The example of which `pack` made this."""
        codes = cls._codes()
        at = 4 * len(codes)
        found = []
        for code, count in zip(codes, array("i", data[:at]), strict=True):
            values = array(code)
            end = at + count * values.itemsize
            values.frombytes(data[at:end])
            found.append(values.tolist())
            at = end
        return cls(*found)

    @classmethod
    def _codes(cls) -> list[str]:
        return ["d" if field.name in cls.floats else "i" for field in fields(cls)]

    def _lists(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]
