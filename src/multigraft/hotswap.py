"""Hot-swapping: another adapter in the place of one, by values alone, into a compiled model too.

    prepare_model_for_compiled_hotswap(model, target_rank=64)      once, before torch.compile
    hotswap_adapter(model, "path/to/another", "default")           as often as you like

Under PEFT's names (`peft.utils.hotswap`). After the first line adapters of any rank up to the
target, and of any scale, can be swapped in with no recompilation (`multigraft.slots`). Without it,
another rank or scale is swapped in all the same, and compiled code is made anew.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.config import PeftConfig
from multigraft.containers import fetch
from multigraft.errors import (
    CheckpointError,
    ConfigError,
    MultigraftWarning,
    StateError,
    UnsupportedError,
)
from multigraft.graft import Graft
from multigraft.keys import disk_names, strip_prefix
from multigraft.layer import AdaptedLayer
from multigraft.loading import HUB_OPTIONS, check_options, read_config
from multigraft.methods.lora import LoRA, LoraConfig
from multigraft.per_expert import PerExpert
from multigraft.roster import Roster
from multigraft.slots import Slotted, into_slot, slot_refusal
from multigraft.state import drop_base_tensors, roster_of_model


class Swap(NamedTuple):
    """What happens at one graft.

    Args:
        values: its new tensors by name; none where the new adapter has nothing.
        rank: the new adapter's there.
    """

    layer: AdaptedLayer
    graft: Graft
    values: dict[str, Tensor]
    rank: int


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Put every LoRA adapter of the model into a slot, where others can take its place.

    Call it after the first adapter is loaded, and before the model is compiled and an optimiser is
    made: parameters that grow are new objects.

    Args:
        target_rank: the slots' rank, the largest of all adapters to come; each adapter's own by
            default, so that only scales may differ.
        config: configs of the adapters to come; their ranks are checked, and nothing is changed.
        check_compiled: what to do when the model is compiled already.

    Raises:
        StateError: there is no LoRA adapter, one is merged, or the model is compiled already.
        ConfigError: an adapter, or a config, has a larger rank than ``target_rank``.
        UnsupportedError: an adapter is more than plain LoRA.
    """
    _check_compiled(model, check_compiled)
    configs = config.values() if isinstance(config, Mapping) else [config] if config else []
    for given in configs:
        largest = max([given.r, *given.rank_pattern.values()])
        if target_rank is not None and largest > target_rank:
            raise ConfigError(
                f"`target_rank` (={target_rank}) is below the rank of a config (={largest}). Give "
                "the largest rank of all."
            )
    roster, _ = roster_of_model(unwrapped(model))
    names = [n for n, c in roster.configs.items() if isinstance(c, LoraConfig)]
    if not names:
        raise StateError("hot-swapping needs a LoRA adapter to swap out; load the first one first.")
    grafts = [(x, g) for n in names for x, g in roster.grafts(n) if not g.method.rides]
    for _, graft in grafts:
        _check_slot(roster, graft, target_rank)
    roster.forget_stacks()
    for layer, graft in grafts:
        into_slot(layer, graft, target_rank or 0, is_fixed=True)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Load an adapter's files in the place of an adapter that the model has, compiled or not.

    The name stays; values, scale, rank and config are the new one's. Where the new adapter has
    nothing at a site, the site does nothing.

    Args:
        torch_device: kept for PEFT's signature; values go where the old ones are.
        kwargs: ``subfolder``, and what `PeftConfig.from_pretrained` takes to find files on the hub.

    Raises:
        CheckpointError: the new adapter acts where the old one does not, or needs a larger slot;
            nothing was changed.
        UnsupportedError: either is more than plain LoRA; nothing was changed.
    """
    check_options(kwargs)
    config, options = read_config(model_name_or_path, adapter_name, kwargs)
    where = {k: v for k, v in options.items() if k in (*HUB_OPTIONS, "subfolder")}
    tensors = checkpoint.read(checkpoint.locate_weights(model_name_or_path, **where))
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors by their names on disk; see `hotswap_adapter`.

    Args:
        parameter_prefix: kept for PEFT's signature.
    """
    roster, _ = roster_of_model(unwrapped(model))
    roster.require_one(adapter_name)
    if not isinstance(config, LoraConfig):
        raise UnsupportedError(
            f"hot-swapping is for LoRA, and the new adapter is {config.peft_type}. Use "
            "load_adapter() under another name."
        )
    if adapter_name in roster.merged:
        raise StateError(
            f"adapter `{adapter_name}` is merged into the base and cannot be swapped there. Call "
            "unmerge_adapter() first."
        )
    own = config.copy()
    assert isinstance(own, LoraConfig)
    found = {_bare(strip_prefix(key), adapter_name): v for key, v in state_dict.items()}
    sites = [graft.site for _, graft in roster.grafts(adapter_name)]
    found = PerExpert(roster.root, own, found).tensors(sites)  # which may rewrite the config
    swaps = _plan(roster, adapter_name, own, found)
    roster.forget_stacks()
    for swap in swaps:
        _put_in(swap, own)
    roster.configs[adapter_name] = own


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Fail unless an adapter of the second config could take the place of one of the first.

    Ranks, scales and patterns may differ; `hotswap_adapter` checks the rest against the model.

    Raises:
        UnsupportedError: one of them is not LoRA, or only one of them is DoRA.
    """
    for config in (config0, config1):
        if not isinstance(config, LoraConfig):
            raise UnsupportedError(
                f"hot-swapping is for LoRA, and one of the configs is {config.peft_type}. Use "
                "load_adapter() under another name."
            )
    doras = [bool(getattr(config, "use_dora", False)) for config in (config0, config1)]
    if doras[0] != doras[1]:
        raise UnsupportedError(
            f"`use_dora` is {doras[0]} in one config and {doras[1]} in the other: one cannot take "
            "the other's place. Use load_adapter() under another name."
        )


def _bare(key: str, adapter: str) -> str:
    """A key as in a file, where it holds the adapter's name as PEFT's swapping has it."""
    head, dot, last = key.rpartition(".")
    middle = f".{adapter}"
    return f"{head.removesuffix(middle)}{dot}{last}" if ".lora_" in key else key


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, if there is one."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _check_compiled(model: nn.Module, check: str) -> None:
    if check not in ("error", "warn", "ignore"):
        raise ConfigError(f'`check_compiled` (={check!r}) must be "error", "warn" or "ignore".')
    is_compiled = any("_orig_mod" in m._modules or m._compiled_call_impl for m in model.modules())
    message = (
        "the model is compiled already: what was compiled is made anew when slots come in. Call "
        "prepare_model_for_compiled_hotswap() before torch.compile()."
    )
    if is_compiled and check == "error":
        raise StateError(message)
    if is_compiled and check == "warn":
        warnings.warn(message, MultigraftWarning, stacklevel=3)


def _check_slot(roster: Roster, graft: Graft, target: int | None) -> None:
    refusal = slot_refusal(graft)
    if refusal:
        raise UnsupportedError(
            f"adapter `{graft.adapter}` cannot be hot-swapped: {refusal}, and slots hold plain "
            "LoRA. Delete it first, or swap adapters with set_adapter()."
        )
    if graft.adapter in roster.merged:
        raise StateError(f"adapter `{graft.adapter}` is merged; call unmerge_adapter() first.")
    lora = graft.method
    own = lora.most if isinstance(lora, Slotted) else lora.rank
    if target is not None and own > target:
        raise ConfigError(
            f"`target_rank` (={target}) is below the rank of `{graft.adapter}` at {graft.site} "
            f"(={own}). Give the largest rank of all."
        )
    refusal = lora.geometry.check_rank(graft.site.layer, max(target or 0, own))
    if refusal:
        raise ConfigError(f"`target_rank` (={target}): at {graft.site}, {refusal}.")


def _plan(
    roster: Roster, adapter: str, config: LoraConfig, found: Mapping[str, Tensor]
) -> list[Swap]:
    """What goes where; fails unless all of it fits.

    Raises:
        CheckpointError, UnsupportedError: see `hotswap_adapter`.
    """
    keys = {id(g): _keys(g, config) for _, g in roster.grafts(adapter)}
    known = {key: () for names in keys.values() for key in names.values()}
    found = drop_base_tensors(found, known, roster.root)
    strange = sorted(set(found) - set(known))
    if strange:
        raise CheckpointError(
            f"the new adapter has tensors where `{adapter}` has none: {', '.join(strange[:5])}. "
            "Only what acts at the same modules, or at some of them, can be swapped in; load it "
            "under another name. Nothing was changed."
        )
    swaps = []
    for layer, graft in roster.grafts(adapter):
        values = {name: found[key] for name, key in keys[id(graft)].items() if key in found}
        swaps.append(Swap(layer, graft, values, _rank(graft, values, keys[id(graft)], config)))
    return swaps


def _keys(graft: Graft, config: LoraConfig) -> dict[str, str]:
    """Name in memory to key on disk, of all that can be swapped at one graft."""
    method = graft.method
    if isinstance(method, LoRA):
        refusal = slot_refusal(graft)
        fresh = type(method)(graft.site, config)
        if refusal or fresh.variant is not None or fresh.bias or fresh.start.takes_out:
            raise UnsupportedError(
                f"hot-swapping is for plain LoRA: {refusal or 'the new adapter has a variant'}. "
                "Load it under another name. Nothing was changed."
            )
        names = {name: name for name in (method.A, method.B)}
    else:
        names = {n: s.on_disk or n for n, s in graft.specs().items() if s.saved}
    return {name: disk_names(graft.site, on_disk, config) for name, on_disk in names.items()}


def _rank(
    graft: Graft, values: Mapping[str, Tensor], keys: Mapping[str, str], config: LoraConfig
) -> int:
    """The rank that the new adapter has at one site, zero for none; its values are checked."""
    lora = graft.method
    params = graft.params
    missing = [keys[name] for name in keys if name not in values]
    if missing and (values or not isinstance(lora, LoRA)):
        raise CheckpointError(f"the new adapter lacks {', '.join(missing)}. Nothing was changed.")
    if not isinstance(lora, LoRA):
        wanted = {name: tuple(params[name].shape) for name in keys}
        rank = 0
    elif not values:
        return 0
    else:
        rank = type(lora)(graft.site, config).rank
        if isinstance(lora, Slotted) and lora.is_fixed and rank > lora.most:
            raise CheckpointError(
                f"the new adapter has rank {rank} at {graft.site}, and the slot there is of rank "
                f"{lora.most}. Call prepare_model_for_compiled_hotswap(model, target_rank=...) "
                "with the largest rank of all. Nothing was changed."
            )
        shapes = lora.geometry.factor_shapes(graft.site.layer, rank)
        wanted = dict(zip((lora.A, lora.B), shapes, strict=True))
    for name, shape in wanted.items():
        if tuple(values[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{keys[name]} has the shape {tuple(values[name].shape)}, and this model and the "
                f"new config need {tuple(shape)}. Nothing was changed."
            )
        if values[name].is_floating_point() and not torch.isfinite(values[name]).all():
            raise CheckpointError(f"{keys[name]} holds NaN or infinity. Nothing was changed.")
    return rank


def _put_in(swap: Swap, config: LoraConfig) -> None:
    """Write one graft's new values; none of it can fail any more."""
    graft, values, rank = swap.graft, swap.values, swap.rank
    lora = graft.method
    if not isinstance(lora, LoRA):
        for name, value in values.items():
            fetch(*graft.owners[name]).copy_(value)
        return
    if rank > lora.most if isinstance(lora, Slotted) else rank != lora.rank:
        lora = into_slot(swap.layer, graft, rank)
    if isinstance(lora, Slotted):
        lora.become(config, rank)
        graft.own_specs = lora.tensors()
    else:
        graft.method = lora = LoRA(graft.site, config)
    if graft.tied is not None:
        return
    for name in (lora.A, lora.B):
        tensor = fetch(*graft.owners[name])
        if values:
            tensor.copy_(lora.unpacked(name, values[name].to(tensor), tensor))
        else:
            tensor.zero_()
