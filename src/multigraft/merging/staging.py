"""A folder that is there whole or not at all.

    .merged.making-x1y2z3/   beside the final place: written, flushed, checked; its lock is held
    merged/                  then one rename

A writer that is killed leaves a staging folder that nothing reads; the next one with the same
target removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multigraft.errors import CheckpointError, StateError

try:
    import fcntl
except ImportError:  # not on Windows, where what killed writers left stays
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which has the target's name when the block ends well.

    Raises:
        StateError: there is something of that name already, and it is not to be replaced.
        CheckpointError: the disk refuses; what was there before is unchanged.
    """
    require_free(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target}: nothing can be written there ({error}).") from error
    # Locked under another name first: a sweep must never find it free.
    lock = open(stage / f"{LOCK}.new", "wb")  # noqa: SIM115 - held as long as the writer lives
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # file systems without locks are swept by nobody
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(lock.name, stage / LOCK)
        yield stage
        (stage / LOCK).unlink()
        _put_in_place(stage, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: it could not be written ({error}). Nothing of that name was made or "
            "changed; free some space, or choose another place."
        ) from error
    finally:
        lock.close()
        shutil.rmtree(stage, ignore_errors=True)


def require_free(target: Path, *, overwrite: bool = False) -> None:
    """Fail unless a folder of this name can be made.

    Raises:
        StateError: one is there, and it is not to be replaced.
    """
    is_empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not (is_empty or (overwrite and target.is_dir())):
        raise StateError(
            f"{target} exists. Choose another --output, or pass --overwrite to replace the folder."
        )


def require_space(target: Path, needed: int) -> None:
    """Fail unless the disk has room for so many bytes.

    Raises:
        CheckpointError: it has not.
    """
    place = next(p for p in (target, *target.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{target}: {needed / 1e9:,.2f} GB are needed, and {free / 1e9:,.2f} GB are free on "
            "that disk. Free some space, or choose another place."
        )


def sweep(target: Path) -> None:
    """Remove what killed writers of this target left."""
    for stage in target.parent.glob(f".{target.name}.making-*"):
        if fcntl is None or stage.is_symlink() or not (stage / LOCK).is_file():
            continue
        with contextlib.suppress(OSError), open(stage / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
            shutil.rmtree(stage, ignore_errors=True)


def _put_in_place(stage: Path, target: Path) -> None:
    os.chmod(stage, 0o777 & ~_umask())
    if not target.is_dir():
        os.rename(stage, target)
    elif not any(target.iterdir()):
        target.rmdir()
        os.rename(stage, target)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, old / target.name)
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(old / target.name, target)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)
    _flush(target.parent)


def _flush(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
