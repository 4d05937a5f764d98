"""What differs between two adapters: in their configs, in their tensors, and in what they change.

Two files can hold other factors and mean the same change; so the changes themselves are compared
too, from their factors, without a product as large as the base's weight.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multigraft.errors import MultigraftError
from multigraft.inspection.change import Change, Left, changes_in_files, changes_on
from multigraft.inspection.files import AdapterFiles, read_adapter

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class FieldDifference:
    """A config's key whose values differ; ``None`` beside `in_first` False means: not there."""

    key: str
    first: Any
    second: Any
    in_first: bool = True
    in_second: bool = True


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that one file lacks, or whose shape, dtype or values differ.

    Args:
        kind: ``"added"``, ``"removed"``, ``"shape"``, ``"dtype"`` or ``"values"``.
        first, second: dtype and shape in each, or an empty string.
        largest: of the differences of two numbers.
        relative: the norm of the difference beside that of the first tensor.
        cosine: of the angle between the two.
    """

    key: str
    kind: str
    first: str = ""
    second: str = ""
    largest: float | None = None
    relative: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class ChangeDifference:
    """How far the changes ΔW that two adapters make at one site are from each other.

    Args:
        first, second: Frobenius norms of the two; 0 for an adapter that is not there.
        distance: of the difference.
        cosine: of the angle between the two; None where one of them is zero.
    """

    path: str
    first: float
    second: float
    distance: float
    cosine: float | None

    @property
    def relative(self) -> float:
        """The distance beside the first one's norm, or the second's where that is zero."""
        return self.distance / (self.first or self.second or 1.0)


@dataclass(frozen=True, repr=False)
class Difference:
    """Two adapters, compared; prints as a table.

    Args:
        first, second: their names.
        fields: keys of the configs that differ.
        tensors: those that differ; ``same`` counts the others.
        changes: sites at which what they do differs, or is compared.
        left: what has no change to compare, and why.
    """

    first: str
    second: str
    fields: tuple[FieldDifference, ...]
    tensors: tuple[TensorDifference, ...]
    same: int
    changes: tuple[ChangeDifference, ...]
    left: Mapping[str, str]

    @property
    def is_same(self) -> bool:
        """Whether configs and tensors are equal, bit for bit."""
        return not self.fields and not self.tensors

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "is_same": self.is_same}

    def __str__(self) -> str:
        from multigraft.inspection.diff_table import text

        return text(self)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        """What rich prints."""
        from multigraft.inspection.diff_table import rich_group

        return rich_group(self)


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    allow_pickle: bool = False,
) -> Difference:
    """Compare two adapters on disk.

    Args:
        first, second: directories, or ids on the hub.
        base: the model that they belong to, for methods whose change needs its weights; it is
            given back as it was.

    Raises:
        CheckpointError, ConfigError: one of them is none, or damaged.
    """
    pair = tuple(read_adapter(each, allow_pickle=allow_pickle) for each in (first, second))
    left = Left()
    a, b = pair
    fields = tuple(_fields(a.values, b.values))  # with another scale, equal tensors mean less
    tensors = [_tensor(key, a.tensors.get(key), b.tensors.get(key)) for key in _keys(a, b)]
    found = tuple(each for each in tensors if each is not None)
    return Difference(
        first=str(first),
        second=str(second),
        fields=fields,
        tensors=found,
        same=len(tensors) - len(found),
        changes=tuple(_changes(a, b, base, left)) if found or fields else (),
        left=left.reasons,
    )


def _keys(a: AdapterFiles, b: AdapterFiles) -> list[str]:
    return list(dict.fromkeys([*a.tensors, *b.tensors]))


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[FieldDifference]:
    keys = sorted({*a, *b})
    return [
        FieldDifference(key, a.get(key), b.get(key), key in a, key in b)
        for key in keys
        if (key in a) != (key in b) or not _is_equal(a[key], b[key])
    ]


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same: 1 is not true; names may stand in any order."""
    if isinstance(a, list) and isinstance(b, list) and all(isinstance(x, str) for x in a + b):
        return sorted(a) == sorted(b)
    return type(a) is type(b) and a == b


def _tensor(key: str, a: Tensor | None, b: Tensor | None) -> TensorDifference | None:
    """The difference of two tensors; None where there is none, to the bit."""
    if a is None or b is None:
        kind = "added" if a is None else "removed"
        return TensorDifference(key, kind, _kind_of(a), _kind_of(b))
    kinds = _kind_of(a), _kind_of(b)
    if a.shape != b.shape:
        return TensorDifference(key, "shape", *kinds)
    if a.dtype == b.dtype and _same_bits(a, b):
        return None
    x, y = (_wide(t) for t in (a, b))
    gap = y - x
    size = float(x.norm())
    return TensorDifference(
        key,
        "values" if a.dtype == b.dtype else "dtype",
        *kinds,
        largest=float(gap.abs().max()) if gap.numel() else 0.0,
        relative=float(gap.norm()) / size if size else None,
        cosine=_cosine(float((x * y).sum()), size, float(y.norm())),
    )


def _kind_of(tensor: Tensor | None) -> str:
    if tensor is None:
        return ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape))}".strip()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, so that NaN equals itself."""
    views = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*views)


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64).reshape(-1)


def _cosine(product: float, a: float, b: float) -> float | None:
    return product / (a * b) if a and b else None


def _changes(
    a: AdapterFiles, b: AdapterFiles, base: nn.Module | None, left: Left
) -> list[ChangeDifference]:
    tables = []
    for files in (a, b):
        try:
            found = changes_in_files(files, left) if base is None else changes_on(base, files, left)
            tables.append({change.path: change for change in found})
        except MultigraftError as error:
            if base is not None:
                raise
            left.reasons[f"{files.name} as a whole"] = str(error)
            return []
    paths = dict.fromkeys(path for table in tables for path in table)
    return [_compared(path, *(table.get(path) for table in tables)) for path in paths]


def _compared(path: str, a: Change | None, b: Change | None) -> ChangeDifference:
    first, second = (0.0 if each is None else max(inner(each, each), 0.0) ** 0.5 for each in (a, b))
    if a is None or b is None:
        return ChangeDifference(path, first, second, max(first, second), None)
    cosine = _cosine(inner(a, b), first, second)
    gap = distance(a, b)
    is_rounding = gap <= 1e-13 * max(first, second)
    return ChangeDifference(path, first, second, 0.0 if is_rounding else gap, cosine)


def inner(a: Change, b: Change) -> float:
    """``tr(ΔAᵀ ΔB)``, summed over the pairs: from the factors where both have them."""
    if a.factors is not None and b.factors is not None:
        (a1, b1), (a2, b2) = ((x.double(), y.double()) for x, y in (a.factors, b.factors))
        return float(((b1.mT @ b2) * (a1 @ a2.mT)).sum())
    return float((a.matrices().double() * b.matrices().double()).sum())


def distance(a: Change, b: Change) -> float:
    """Frobenius norm of ``ΔA - ΔB``.

    From triangular factors rather than ‖ΔA‖² - 2⟨ΔA, ΔB⟩ + ‖ΔB‖², which would lose half of the
    digits where the two are close.
    """
    if a.factors is None or b.factors is None:
        return float((a.matrices().double() - b.matrices().double()).norm())
    (a1, b1), (a2, b2) = ((x.double(), y.double()) for x, y in (a.factors, b.factors))
    left = torch.linalg.qr(torch.cat([b1, -b2], dim=2), mode="r").R
    right = torch.linalg.qr(torch.cat([a1, a2], dim=1).mT, mode="r").R
    return float((left @ right.mT).norm())
