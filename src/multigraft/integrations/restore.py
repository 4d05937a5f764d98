"""A checkpoint's adapters, loaded over those that a model has."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import nn

from multigraft.errors import MultigraftWarning, NestingError
from multigraft.loading import load_into
from multigraft.reading import CONFIG_NAME
from multigraft.roster import Roster
from multigraft.survey import survey
from multigraft.tuner import Tuner, base_of
from multigraft.wrap import roster_of


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> bool:
    """Give each adapter of a model the tensors and the config that a checkpoint has for it.

    Parameters keep their identity where shapes allow, and which adapters act and train stays.

    Args:
        model: a `PeftModel`, or a model that was adapted in place.
        folder: holds one adapter, and others in subfolders, as `save_pretrained` writes them.

    Returns:
        Whether anything was loaded: False without adapters of ours, in the model or in the folder.

    Raises:
        CheckpointError: a file is damaged or does not fit.
    """
    roster = _roster(model)
    if roster is None or not roster.configs:
        return False
    found = _adapters_in(Path(folder), roster)
    missing = [name for name in roster.configs if name not in found]
    if found and missing:
        warnings.warn(
            f"{folder} holds nothing for adapters {missing}: they stay as they are.",
            MultigraftWarning,
            stacklevel=2,
        )
    for name, path in found.items():
        is_trainable = not roster.configs[name].inference_mode
        load_into(Tuner(roster.root), path, name, is_trainable=is_trainable)
    return bool(found)


def _roster(model: nn.Module) -> Roster | None:
    base = base_of(model)
    handle = getattr(model, "roster", None)  # prompts are known to the handle alone
    if isinstance(handle, Roster):
        return handle
    try:
        return roster_of(base, survey(base))
    except NestingError:  # adapted by another library, or in a part only
        return None


def _adapters_in(folder: Path, roster: Roster) -> dict[str, Path]:
    """Folders by the name of the adapter that they hold; the model's own adapters alone."""
    found = {n: folder / n for n in roster.configs if (folder / n / CONFIG_NAME).is_file()}
    if (folder / CONFIG_NAME).is_file():
        # Trainers of before wrote a single adapter of any name there.
        rest = [name for name in roster.configs if name not in found]
        name = "default" if "default" in roster.configs else rest[0] if len(rest) == 1 else None
        if name is not None:
            found[name] = folder
    return found
