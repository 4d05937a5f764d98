"""A transformers model that was adapted in place, in transformers' words.

`PreTrainedModel` has methods of its own for adapters, which look for PEFT's layers, and a flag by
which it saves adapters rather than itself. While a model has our adapters, the model object itself
carries the flag and methods of the same names that mean ours; its class stays as it is.

A model that a handle adapted (`get_peft_model`) is saved by the handle: there the base's own
`save_pretrained` means the base, without adapters and under its own names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from multigraft.aliased import FLAG, is_aliased
from multigraft.card import update_card
from multigraft.config import PeftConfig
from multigraft.errors import UnsupportedError
from multigraft.roster import Roster
from multigraft.saving import write_adapters

if TYPE_CHECKING:
    from multigraft.checkpoint import LoadReport
    from multigraft.tuner import Tuner


def offer(roster: Roster) -> None:
    """Put the flag and the methods on the base model, if it is one of transformers'."""
    seen = roster.root.__dict__
    if not any(roster.layers.values()):  # prompts act at a handle, and the base is as it was
        withdraw(roster.root)
    elif not seen.get(FLAG) and _is_of_transformers(roster.root):
        seen[FLAG] = True
        if not is_aliased():  # else the model's own methods mean ours
            seen.update({name: partial(method, roster) for name, method in METHODS.items()})
        if not roster.in_place:
            seen["save_pretrained"] = partial(_save_base, roster)


def withdraw(model: nn.Module) -> None:
    """Take them off."""
    if isinstance(model.__dict__.get("save_pretrained"), partial):
        for name in METHODS:
            model.__dict__.pop(name, None)
    elif not is_aliased():
        return
    model.__dict__.pop(FLAG, None)


def _is_of_transformers(model: nn.Module) -> bool:
    module = sys.modules.get("transformers.modeling_utils")  # an unloaded class has no instance
    return module is not None and isinstance(model, module.PreTrainedModel)


def _tuner(roster: Roster) -> Tuner:
    from multigraft.tuner import Tuner

    return Tuner(roster.root)


def _save_pretrained(
    roster: Roster,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    save_embedding_layers: str | bool = "auto",
    **kwargs: Any,
) -> None:
    """Save the adapters as `PeftModel.save_pretrained` does; never the base.

    Raises:
        CheckpointError: tensors are missing or the disk refuses; old files are unchanged.
        UnsupportedError: ``push_to_hub`` is asked for.
    """
    if push_to_hub:
        raise UnsupportedError(
            "`push_to_hub` (=True): a model that was adapted in place is saved here and pushed "
            "apart. Call model.push_to_hub(name), which uploads its adapters."
        )
    if is_main_process:
        write_adapters(
            roster,
            save_directory,
            roster.names(),
            state_dict=state_dict,
            embeddings=save_embedding_layers,
        )


def _save_base(
    roster: Roster, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """The model's own `save_pretrained` of its base's tensors; what is merged is in them."""
    from multigraft.base_state import get_base_model_state_dict

    model = roster.root
    if kwargs.get("state_dict") is None:
        kwargs["state_dict"] = get_base_model_state_dict(model)
    seen = model.__dict__
    held = {name: seen.pop(name) for name in (FLAG, *METHODS) if name in seen}
    try:
        return model.save_pretrained(save_directory, *args, **kwargs)  # type: ignore[operator]
    finally:
        seen.update(held)


def _create_or_update_model_card(roster: Roster, output_dir: str | os.PathLike[str]) -> None:
    update_card(output_dir, roster.configs[roster.first_active])


def _load_adapter(
    roster: Roster,
    peft_model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **options: Any,
) -> LoadReport:
    from multigraft.loading import load_into

    tuner = _tuner(roster)
    return load_into(
        tuner, peft_model_id, adapter_name, is_trainable=is_trainable, activate=True, **options
    )


def _add_adapter(roster: Roster, adapter_config: PeftConfig, adapter_name: str = "default") -> None:
    from multigraft.tuner import inject_adapter_in_model

    inject_adapter_in_model(adapter_config, roster.root, adapter_name)


def _set_adapter(roster: Roster, adapter_name: str | Sequence[str]) -> None:
    _tuner(roster).set_adapter(adapter_name)


def _delete_adapter(roster: Roster, adapter_names: str | Sequence[str]) -> None:
    tuner = _tuner(roster)
    for name in roster.require(adapter_names):
        tuner.delete_adapter(name)


def _enable_adapters(roster: Roster) -> None:
    _tuner(roster).enable_adapter_layers()


def _disable_adapters(roster: Roster) -> None:
    _tuner(roster).disable_adapter_layers()


def _active_adapters(roster: Roster) -> list[str]:
    return list(roster.active)


def _get_adapter_state_dict(
    roster: Roster,
    adapter_name: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    from multigraft.state import get_peft_model_state_dict

    return get_peft_model_state_dict(roster.root, state_dict, adapter_name or roster.first_active)


METHODS: dict[str, Callable[..., Any]] = {
    "active_adapters": _active_adapters,
    "add_adapter": _add_adapter,
    "create_or_update_model_card": _create_or_update_model_card,
    "delete_adapter": _delete_adapter,
    "disable_adapters": _disable_adapters,
    "enable_adapters": _enable_adapters,
    "get_adapter_state_dict": _get_adapter_state_dict,
    "load_adapter": _load_adapter,
    "save_pretrained": _save_pretrained,
    "set_adapter": _set_adapter,
}
