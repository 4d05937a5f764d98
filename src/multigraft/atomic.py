"""Writing files so that readers see the old ones or the new ones, never half of either.

    folder/.saving-x1y2z3/   the new files, written and flushed; its lock is held by a live writer
    folder/                  then every new file is renamed into place, and the old ones come back
                             when one of these renames fails

A writer that is killed leaves a staging folder that nothing reads; the next one there removes it.
Between the renames it notes which they are, so that whoever comes next, to save or to load, can
put the old files back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

from multigraft.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows, where what killed writers left stays
    fcntl = None  # type: ignore[assignment]

PREFIX = ".saving-"
DRAFT = ".draft-"
NOTE = "renaming.json"
NOTE_BYTES = 1 << 20
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""How file systems say that a folder is nothing to flush."""


def write_files(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write every file aside, flush them all, then put all in place; or leave what was there.

    Folders that are missing are made, and removed again after a failure.

    Args:
        files: targets to writers, each of which fills the path that it is given.

    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        _write_all(files)
    except OSError as error:
        raise CheckpointError(
            f"{next(iter(files)).parent}: nothing could be saved ({error}). Files that were there "
            "before are unchanged; free some space or choose another directory."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write one text file atomically, in UTF-8."""
    write_files({path: lambda p: write_utf8(p, text)})


def place_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is there whole, or not at all; what lay there before is replaced.

    Args:
        fill: puts files into the folder that it is given, beside the target.

    Raises:
        CheckpointError: the disk refuses; what lay there before is unchanged.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{DRAFT}*"):  # of a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=target.parent))
        try:
            fill(draft)
            for path in sorted(draft.rglob("*")):
                (_flush_folder if path.is_dir() else _flush)(path)
            os.chmod(draft, 0o777 & ~_umask())
            _flush_folder(draft)
            if target.exists():
                shutil.rmtree(target)
            os.replace(draft, target)
            _flush_folder(target.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{target}: nothing could be saved ({error}). Free some space or choose another "
            "directory; what was saved before is unchanged."
        ) from error


def write_utf8(path: Path, text: str) -> None:
    """Write a text file in place."""
    path.write_text(text, encoding="utf-8")


def _write_all(files: Mapping[Path, Callable[[Path], None]]) -> None:
    made = _make_folders(target.parent for target in files)
    stages: dict[Path, Stage] = {}
    try:
        for target, writer in files.items():
            if target.parent not in stages:
                stages[target.parent] = Stage(target.parent)
            stages[target.parent].write(target.name, writer)
        for stage in stages.values():
            stage.note()
        for target in files:
            stages[target.parent].put_in_place(target.name)
        for folder in stages:
            _flush_folder(folder)
    except BaseException:
        for stage in stages.values():
            stage.put_back()
            stage.remove()
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    for stage in stages.values():
        stage.remove()


def recover(folder: Path) -> None:
    """Undo what killed writers left half-done in this folder, and remove their staging folders.

    Raises:
        CheckpointError: old files cannot be put back.
    """
    for left in folder.glob(f"{PREFIX}*/lock") if fcntl else ():
        if left.parent.is_symlink() or left.is_symlink() or not left.is_file():
            continue  # no writer's: it came with files of somebody else's
        with contextlib.suppress(FileNotFoundError), open(left, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its writer lives
            try:
                _undo(folder, left.parent)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{folder}: a save was cut short here, and the old files in {left.parent.name} "
                    f"cannot be put back ({error}). Make the folder writable, or save again."
                ) from error
            _remove(left.parent)


class Stage:
    """A folder beside the targets that holds the new files, and the old ones while they go.

    Its files have numbers for names, so that nobody takes it for a folder of adapters.
    """

    def __init__(self, folder: Path) -> None:
        recover(folder)
        self.folder = folder
        self.replaces: dict[str, bool] = {}
        self.done: list[str] = []
        self.lock: IO[bytes] | None = None
        self.place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            self.lock = _lock(self.place / "lock")
        except BaseException:
            self.remove()
            raise

    def write(self, name: str, writer: Callable[[Path], None]) -> None:
        """Write and flush one new file, and keep a second name of the one that it will replace."""
        new, old = _staged(self.place, len(self.replaces))
        self.replaces[name] = os.path.lexists(self.folder / name)
        writer(new)
        _flush(new)
        os.chmod(new, 0o666 & ~_umask())
        if self.replaces[name]:
            _link(self.folder / name, old)

    def note(self) -> None:
        """Note what is about to be renamed."""
        draft = self.place / f"{NOTE}.new"
        write_utf8(draft, json.dumps(self.replaces))
        _flush(draft)
        os.replace(draft, self.place / NOTE)
        _flush_folder(self.place)

    def put_in_place(self, name: str) -> None:
        """Rename the new file to its target."""
        new, _ = _staged(self.place, list(self.replaces).index(name))
        os.replace(new, self.folder / name)
        self.done.append(name)

    def put_back(self) -> None:
        """Give replaced targets their old files again."""
        if self.done:
            _undo(self.folder, self.place)

    def remove(self) -> None:
        """Take the folder away; what is in place stays."""
        _remove(self.place)  # while the lock is held: whoever finds its note undoes the save
        if self.lock is not None:
            self.lock.close()


def _staged(place: Path, number: int) -> tuple[Path, Path]:
    """Where the new and the old file with this number are."""
    return place / f"{number}", place / f"{number}.old"


def _undo(folder: Path, place: Path) -> None:
    """Put back what the note in a staging folder says was renamed; again does no harm."""
    for number, (name, had_old) in enumerate(_noted(place / NOTE).items()):
        new, old = _staged(place, number)
        if os.path.lexists(new):
            continue  # this one was not renamed
        if not had_old:
            (folder / name).unlink(missing_ok=True)
        elif os.path.lexists(old):
            os.replace(old, folder / name)


def _noted(note: Path) -> dict[str, bool]:
    """Names of files to whether they replace others; a folder from elsewhere may hold any note.

    Raises:
        ValueError: it names what lies outside its folder, or is no note at all.
    """
    if note.is_symlink() or not note.is_file():
        return {}
    if note.stat().st_size > NOTE_BYTES:
        raise ValueError(f"{NOTE} has more than {NOTE_BYTES:,} bytes")
    try:
        replaces = json.loads(note.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{NOTE} is nested without end") from error
    if not isinstance(replaces, dict) or any(Path(n).name != n or n == ".." for n in replaces):
        raise ValueError(f"{NOTE} must name files of this folder")
    return replaces


def _remove(place: Path) -> None:
    """Remove a staging folder; its note first, which would be wrong once its files go."""
    with contextlib.suppress(OSError):
        (place / NOTE).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)


def _make_folders(folders: Iterable[Path]) -> list[Path]:
    """Make these folders and their parents; those that were made, parents first."""
    made: list[Path] = []
    try:
        for folder in folders:
            missing = [f for f in (folder, *folder.parents) if not f.exists()]
            for each in reversed(missing):
                each.mkdir(exist_ok=True)
                made.append(each)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(folder))
    except BaseException:
        for each in reversed(made):
            each.rmdir()
        raise
    return made


def _lock(path: Path) -> IO[bytes] | None:
    """An open file whose lock the system drops when this process ends, however it ends."""
    if fcntl is None:
        return None
    # Locked under another name first: a sweep must never find it free.
    file = open(path.with_suffix(".new"), "wb")  # noqa: SIM115 - open as long as the writer lives
    with contextlib.suppress(OSError):  # file systems without locks are swept by nobody
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(file.name, path)
    return file


def _link(path: Path, second: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(path, second, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, second, follow_symlinks=False)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
