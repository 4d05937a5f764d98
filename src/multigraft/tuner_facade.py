"""What PEFT's users ask of a tuner besides its adapters' lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from multigraft.config import PeftConfig, TargetedConfig
from multigraft.errors import AdapterNameError, TargetError, UnsupportedError, listed, nearest_of
from multigraft.keys import sites_in, strip_prefix
from multigraft.methods import METHODS
from multigraft.prepare import own_copy
from multigraft.survey import survey

if TYPE_CHECKING:
    from multigraft.roster import Roster

WITHOUT_CONFIG = {"model_type": "custom"}
"""What stands for the config of a model that has none."""


class TunerFacade:
    """Mixed into the tuner."""

    uses_shared_state: ClassVar[bool] = False
    """Whether adapters of the method share tensors across their layers."""

    if TYPE_CHECKING:
        model: nn.Module
        roster: Roster
        add_adapter: Any

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dictionary; of a model without one, that it is a custom one."""
        config: Any = getattr(model, "config", WITHOUT_CONFIG)
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        elif dataclasses.is_dataclass(config) and not isinstance(config, type):
            config = dataclasses.asdict(config)
        return dict(config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Graft the adapter whose config was put into `peft_config` under this name, as with PEFT.

        `add_adapter` takes the config itself.

        Args:
            model: the tuner's own.
            state_dict: an adapter's tensors by name on disk, whose sites are adapted.

        Raises:
            AdapterNameError: there is no such config, or its adapter is there already.
            UnsupportedError: the model is another one.
            TargetError: the config does not fit the model; it is not in `peft_config` any more.
        """
        if model is not self.model:
            raise UnsupportedError(
                f"`model` (={type(model).__name__}) must be the tuner's own model. Use "
                "inject_adapter_in_model() for another one."
            )
        configs = self.roster.configs
        if adapter_name in self.roster.layers or adapter_name not in configs:
            known = "has its adapter" if adapter_name in configs else "is not in `peft_config`"
            raise AdapterNameError(
                f"`adapter_name` (={adapter_name!r}) {known}. Put a config there under a new name, "
                "or call add_adapter(name, config)."
            )
        self.add_adapter(
            adapter_name,
            targeted_by(configs.pop(adapter_name), model, state_dict),
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )


def targeted_by(
    config: PeftConfig, base: nn.Module, state_dict: Mapping[str, Tensor] | None
) -> PeftConfig:
    """A copy of a config that means the sites of an adapter's tensors, if they are given.

    A config that names parameters keeps its own targets: a file's keys do not hold their names.

    Raises:
        TargetError: there are tensors, and none of them is of a module of this model.
    """
    config = own_copy(config)
    named = getattr(config, "target_parameters", None)
    if state_dict is not None and isinstance(config, TargetedConfig) and not named:
        known = {path for spot in survey(base) for path in spot.paths}
        prefix = METHODS[str(config.peft_type)].prefix
        config.target_modules = sites_in(state_dict, prefix, known)
        if state_dict and not (config.target_modules or getattr(config, "modules_to_save", None)):
            paths = [key.partition(f".{prefix}")[0] for key in map(strip_prefix, state_dict)]
            wanted = list(dict.fromkeys(paths))
            raise TargetError(
                f"the state dict has no tensor of an adapter at a module of this model: "
                f"{listed(wanted)}.{nearest_of(wanted, known)} Load it on the model, or the part "
                "of it, that it was made for."
            )
    return config
