"""How an adapter is made rather than what it is: `runtime_config`, which no file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multigraft.config import require
from multigraft.errors import ConfigError, did_you_mean

WHERE = "LoraConfig"


@dataclass
class LoraRuntimeConfig:
    """Options of `LoraConfig` for this process alone.

    Args:
        ephemeral_gpu_offload: compute what a new adapter of a base on the CPU begins with (DoRA's
            norms) on the accelerator, layer by layer, where there is one.
    """

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        value = self.ephemeral_gpu_offload
        require(isinstance(value, bool), WHERE, "ephemeral_gpu_offload", value, "True or False")


def runtime_of(value: Any) -> LoraRuntimeConfig:
    """What `runtime_config` was set to, as the object; None and an empty table are the default.

    Raises:
        ConfigError: it is something else, or has an option that there is not.
    """
    if isinstance(value, LoraRuntimeConfig):
        return value
    what = "a LoraRuntimeConfig, or a dictionary of its options, or None"
    require(value is None or isinstance(value, Mapping), WHERE, "runtime_config", value, what)
    known = ("ephemeral_gpu_offload",)
    for name in value or ():
        if name not in known:
            raise ConfigError(
                f"{WHERE}: `runtime_config` has no option `{name}`."
                f"{did_you_mean(str(name), known)} It has: {', '.join(known)}."
            )
    return LoraRuntimeConfig(**(value or {}))


def borrowed(config: Any, own: torch.device) -> torch.device | None:
    """The accelerator, when what lies on ``own`` is to be computed there for a while; else None."""
    runtime = getattr(config, "runtime_config", None)
    if own.type != "cpu" or not getattr(runtime, "ephemeral_gpu_offload", False):
        return None
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
