"""Where a run's files go, looked at before anything is done."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from multigraft.config import CONFIG_NAME
from multigraft.errors import TrainingError
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
