"""Heads that a base lacks: made anew for a task with labels, trained and saved by each adapter.

A frozen head of random values would be noise. So whatever a checkpoint does not hold is found when
it is loaded, and every adapter that is attached for the task has a copy of its own to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from multigraft.config import PeftConfig
from multigraft.errors import CheckpointError, ConfigError
from multigraft.model import PeftModel

POOLERS = ("pooler", "sequence_summary")
"""Parts of a trunk that stand between it and a head, and that checkpoints without a head lack."""
NAMES = ("lm_head", "score", "classifier", "pre_classifier", "classification_head", *POOLERS)
HEADS = tuple(rf"(\w+\.)?{name}" for name in NAMES)
"""What `quantize` leaves as it is, as expressions: heads that are trained have to be dense."""
_MARK = "multigraft_fresh_modules"


def mark_fresh(source: str, model: nn.Module, missing: Sequence[str]) -> None:
    """Note which modules were made anew, for `attach`.

    Args:
        missing: names of the weights that the checkpoint lacks.

    Raises:
        CheckpointError: it lacks others than those of whole heads.
    """
    fresh = sorted({_owner(model, key) for key in missing})
    for name in fresh:
        if not isinstance(getattr(model, name.partition(".")[0], None), nn.Module):
            raise _incomplete(source, missing, name)
        held = [f"{name}.{key}" for key in model.get_submodule(name).state_dict()]
        is_trunk = name == getattr(model, "base_model_prefix", "") or (
            "." in name and name.rpartition(".")[2] not in POOLERS
        )
        if is_trunk or not set(held) <= set(missing):
            raise _incomplete(source, missing, name)
    setattr(model, _MARK, tuple(fresh))


def fresh_in(model: nn.Module, config: PeftConfig) -> dict[str, Any]:
    """What a config has to say besides, so that its adapter trains and saves what is fresh.

    Raises:
        ConfigError: the method cannot save modules.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    fresh = getattr(base, _MARK, ())
    if not fresh:
        return {}
    if not hasattr(config, "modules_to_save"):
        raise ConfigError(
            f"{type(config).__name__} has no `modules_to_save`, and the base lacks {fresh[0]}, "
            "which has to be trained. Choose another method, or a base that has it."
        )
    return {"modules_to_save": list(dict.fromkeys([*(config.modules_to_save or ()), *fresh]))}


def _incomplete(source: str, missing: Sequence[str], name: str) -> CheckpointError:
    lacking = next(key for key in missing if key.startswith(name))
    return CheckpointError(
        f"{source} lacks {len(missing)} of the model's weights ({lacking}, …), and not those of a "
        "head alone, so they would be random. Is the checkpoint complete?"
    )


def _owner(model: nn.Module, key: str) -> str:
    """The part of the model that a weight is of: a child of the model, or of its trunk."""
    parts = key.split(".")
    depth = 2 if parts[0] == getattr(model, "base_model_prefix", "") and len(parts) > 2 else 1
    return ".".join(parts[:depth])
