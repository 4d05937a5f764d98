"""Bytes, from text and as text."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from multigraft.errors import ConfigError

UNITS = {
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}
BINARY = ("TiB", "GiB", "MiB", "KiB")


def bytes_of(value: str | int, name: str = "memory") -> int:
    """The bytes that ``80GiB``, ``80 GB`` or a number of bytes stand for.

    Raises:
        ConfigError: it is neither, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    units = {unit.lower(): size for unit, size in UNITS.items()}
    unit = units.get((match[2] or "B").lower()) if match else None
    found = int(float(match[1]) * unit) if match and unit else 0
    if found <= 0:
        raise ConfigError(
            f"`{name}` (={value!r}) must be a number above 0 with a unit, such as 80GiB; units are "
            f"{', '.join(UNITS)}."
        )
    return found


def as_text(size: float) -> str:
    """Three or four digits and a binary unit: ``1.50 GiB``."""
    sign, size = ("-" if size < 0 else ""), abs(size)
    unit = next((u for u in BINARY if size >= UNITS[u]), "B")
    number = size / UNITS[unit]
    digits = 0 if unit == "B" or number >= 100 else 1 if number >= 10 else 2
    return f"{sign}{number:,.{digits}f} {unit}"


def spread(value: int | Mapping[str, int]) -> str:
    """One number, or the least and the most of several: ``4 to 8``."""
    if isinstance(value, int):
        return str(value)
    least, most = min(value.values()), max(value.values())
    return str(least) if least == most else f"{least} to {most}"


def memory_here() -> int | None:
    """Bytes of the first GPU, if there is one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
