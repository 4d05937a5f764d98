"""A progress bar, where tqdm is installed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import TypeVar

from multigraft.errors import MultigraftWarning

T = TypeVar("T")


def shown(items: Collection[T], label: str, is_wanted: bool = True) -> Iterable[T]:
    """The items, with a bar on stderr that follows them if ``is_wanted``."""
    if not is_wanted:
        return items
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        warnings.warn(
            f"{label}: no progress bar, since tqdm is not installed: pip install tqdm.",
            MultigraftWarning,
            stacklevel=3,
        )
        return items
    bar: Iterable[T] = tqdm(items, desc=label)
    return bar
