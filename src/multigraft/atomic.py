"""Writing files so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_files(files: dict[Path, Callable[[Path], None]]) -> None:
    """Write every file beside its place, flush them all, then rename them all.

    Each writer is given the temporary path to fill. A failure before the renames (a full disk, an
    interrupt) leaves what was there before and removes what was begun.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for target, writer in files.items():
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            os.close(handle)
            staged.append((Path(name), target))
            writer(Path(name))
            _flush(Path(name))
            os.chmod(name, 0o666 & ~_umask())
        for temporary, target in staged:
            os.replace(temporary, target)
        _flush_directories({target.parent for _, target in staged})
    except BaseException:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write one text file atomically, in UTF-8."""
    write_files({path: lambda p: _put(p, text)})


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_directories(folders: set[Path]) -> None:
    for folder in folders:
        if hasattr(os, "O_DIRECTORY"):
            descriptor = os.open(folder, os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
