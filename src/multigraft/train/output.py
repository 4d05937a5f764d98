"""Where a run's files go, looked at before anything is done."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from multigraft.config import CONFIG_NAME
from multigraft.errors import ConfigError, TrainingError
from multigraft.train.saves import FOLDER, found_in


def refuse_to_replace(folders: Sequence[Path], output: Path, overwrite: bool) -> None:
    """Fail when adapters, or an unfinished run, are there already and must not be replaced.

    Raises:
        TrainingError: they are.
    """
    if overwrite:
        return
    for folder in folders:
        if (folder / CONFIG_NAME).exists():
            raise TrainingError(
                f"{folder} holds an adapter already. Choose another output directory or adapter "
                "name, or replace it with --overwrite (overwrite=True)."
            )
    if found_in(output / FOLDER):
        raise TrainingError(
            f"{output} holds an unfinished run. Go on with --resume (resume=True), or begin anew "
            "with --overwrite (overwrite=True)."
        )


def check_text(key: str, value: str) -> None:
    """Fail when this can name no file or directory.

    Raises:
        ConfigError: it is empty, or holds what no path does.
    """
    if not value.strip() or "\0" in value:
        raise ConfigError(
            f"`{key}` (={value!r}) must name a file, a directory or an id on the hub."
        )


def check_apart(names: Sequence[str]) -> None:
    """Fail when two adapters would share a folder, also where letters' case does not count.

    Raises:
        ConfigError: they would.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(name.casefold(), name)
        if known[name.casefold()] is not name or names.count(name) > 1:
            raise ConfigError(
                f"`adapters`: `{other}` and `{name}` would share a folder, on some systems at "
                "least. Give each a name of its own."
            )


def check_output(folder: Path) -> None:
    """Find out whether an adapter can be written there; nothing is left behind.

    Raises:
        TrainingError: it cannot.
    """
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        raise TrainingError(f"{nearest} is a file; the output must be a directory.")
    try:
        # Asking for permission is not enough: full and special file systems grant it and refuse.
        with tempfile.NamedTemporaryFile(dir=nearest) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise TrainingError(
            f"{nearest} cannot be written to ({error.strerror}). Choose another output directory."
        ) from error
