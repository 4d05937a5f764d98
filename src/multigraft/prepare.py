"""From a config to an adapter that is ready to attach: found, checked, and then made.

`prepare` touches neither model nor memory; `Prepared.grow` makes the tensors. Only
`multigraft.wrap.attach`, after both, edits the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from multigraft import prompts
from multigraft.config import PeftConfig, TargetedConfig
from multigraft.defaults import default_targets
from multigraft.errors import MultigraftWarning, UnsupportedError
from multigraft.graft import Graft, Shared, grow, grow_shared
from multigraft.keys import disk_names
from multigraft.methods import METHODS, Method, TensorSpec
from multigraft.needs import Need
from multigraft.prompts import CONTEXTS, Context
from multigraft.replication import Replication, replicated
from multigraft.roster import Roster
from multigraft.site import Site
from multigraft.sites import find, minimal_names
from multigraft.survey import Spot, survey
from multigraft.wrap import Scion

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Prepared:
    """An adapter that fits the model, before any tensor is made.

    Args:
        adapter: its name.
        config: the model's own copy, with the targets resolved to names.
        parts: (what is needed, the method's instance there), in the model's order.
        model: the base model.
        replication: what must be put in with the adapter's grafts.
    """

    adapter: str
    config: PeftConfig
    parts: list[tuple[Need, Method]]
    model: nn.Module
    replication: Replication | None = None

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes by key on disk, relative to the base model."""
        shapes = {
            key: shape
            for need, method in self.parts
            for key, shape in self._keys(need, method).values()
        }
        shapes |= {spec.on_disk or n: spec.shape for n, spec in self._shared_saved().items()}
        if self.context is not None:
            shapes |= prompts.shapes(self.context, self.config, self.model)
        return shapes

    def optional(self) -> set[str]:
        """Those keys that a file may lack; what they stand for then follows from the base."""
        return {
            self._keys(need, method)[name][0]
            for need, method in self.parts
            for name, spec in method.tensors().items()
            if spec.optional and spec.saved
        }

    @torch.no_grad()
    def grow(self, given: Mapping[str, Tensor], autocast: bool, on_meta: bool) -> list[Scion]:
        """Make every tensor; ``given`` maps keys on disk to values that are taken over.

        Args:
            autocast: float32 adapters on a half-precision (or float8) base.
            on_meta: no memory, no values.
        """
        scions = []
        made: dict[int, Graft] = {}
        copies: dict[int, nn.Module] = {}
        shared = self._grow_shared(given, autocast, on_meta)
        for need, method in self.parts:
            found = self._given_to(need, method, given) if given else {}
            graft = Graft(
                self.adapter,
                method,
                shared if need.method is self.main else None,
                made.get(id(need.site.tied)),
            )
            made[id(need.site)] = graft
            if method.kind == "replace":
                module = copies[id(need.site)] = method.module()
                if found:
                    module.load_state_dict(found, strict=False)
                if graft.tied is not None:
                    source = copies[id(need.site.tied)]
                    module._parameters["weight"] = source._parameters["weight"]
                scions.append(Scion(need.spot, graft, module=module))
                continue
            if graft.tied is not None:
                scions.append(Scion(need.spot, graft))
                continue
            where = _dtype_and_device(need.site, autocast, on_meta)
            scions.append(Scion(need.spot, graft, grow(graft, *where, found)))
        return scions

    def grow_context(
        self, given: Mapping[str, Tensor], autocast: bool, on_meta: bool
    ) -> Context | None:
        """Make what the adapter puts into the context, if it is of that kind; see `grow`."""
        if self.context is None:
            return None
        words = prompts.words_of(self.model)
        weight = next(getattr(words, "base_layer", words).parameters())
        device = torch.device("meta") if on_meta else weight.device
        where = _dtype(weight.dtype, autocast), device
        return prompts.grow(self.context, self.config, self.model, given, where)

    @cached_property
    def context(self) -> type[Context] | None:
        """The context method that the config's ``peft_type`` names, if it is one."""
        return dict(CONTEXTS.items()).get(str(self.config.peft_type))

    @cached_property
    def main(self) -> type[Method] | None:
        """The method that the config's ``peft_type`` names, if it acts on sites."""
        return None if self.context else METHODS[str(self.config.peft_type)]

    @cached_property
    def main_sites(self) -> list[Site]:
        """The sites of the main method."""
        return [need.site for need, _ in self.parts if need.method is self.main]

    def _shared_saved(self) -> dict[str, TensorSpec]:
        if self.main is None:
            return {}
        specs = self.main.shared_specs(self.config, self.main_sites)
        return {name: spec for name, spec in specs.items() if spec.saved}

    def _grow_shared(
        self, given: Mapping[str, Tensor], autocast: bool, on_meta: bool
    ) -> Shared | None:
        if self.main is None or not self.main_sites:
            return None
        where = _dtype_and_device(self.main_sites[0], autocast, on_meta)
        saved = self._shared_saved().items()
        found = {name: given[key] for name, spec in saved if (key := spec.on_disk or name) in given}
        return grow_shared(self.main, self.config, self.main_sites, *where, found)

    def _given_to(
        self, need: Need, method: Method, given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Those of ``given`` that belong to one graft, by name in memory."""
        keys = self._keys(need, method)
        return {name: given[key] for name, (key, _) in keys.items() if key in given}

    def _keys(self, need: Need, method: Method) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in memory to (key on disk, shape), for what is saved."""
        return {
            name: (disk_names(need.site, spec.on_disk or name, self.config), spec.shape)
            for name, spec in method.tensors().items()
            if spec.saved
        }


def _dtype_and_device(
    site: Site, autocast: bool, on_meta: bool
) -> tuple[torch.dtype, torch.device]:
    return _dtype(site.dtype, autocast), torch.device("meta") if on_meta else site.device


def _dtype(base: torch.dtype, autocast: bool) -> torch.dtype:
    is_low = base in LOW_PRECISION or base.itemsize == 1
    return torch.float32 if autocast and is_low else base


def own_copy(config: PeftConfig) -> PeftConfig:
    """The model's own copy of the user's config.

    Raises:
        UnsupportedError: it is no config of ours.
    """
    if not isinstance(config, PeftConfig):
        raise UnsupportedError(
            f"`peft_config` (={type(config).__name__}) must be a config of Multigraft, such "
            "as multigraft.LoraConfig. Change the import of the config as well."
        )
    return config.copy()


def prepare(
    model: nn.Module, adapter: str, config: PeftConfig, *, lenient: bool = False
) -> Prepared:
    """Find the sites and let each method check its own; pure.

    Raises:
        TargetError: the config does not fit this model.
    """
    config = own_copy(config)
    with replicated(Roster.of(model), config) as replication:
        prepared = _prepared(model, adapter, config, lenient)
    prepared.replication = replication
    return prepared


def _prepared(model: nn.Module, adapter: str, config: PeftConfig, lenient: bool) -> Prepared:
    kinds = CONTEXTS if str(config.peft_type) in CONTEXTS else METHODS
    kinds[str(config.peft_type)].complete(config, model)
    spots = survey(model)
    needs = find(model, config, spots, lenient=lenient)
    main = [n for n in needs if n.method.name == str(config.peft_type)]
    parts = [(need, need.method(need.site, config)) for need in needs]
    _check_dropout([(need.site, method) for need, method in parts])
    _resolve_targets(model, config, main, spots)
    _resolve_layout(config, main)
    return Prepared(adapter, config, parts, model)


def _check_dropout(parts: Sequence[tuple[Site, Method]]) -> None:
    """Say where dropout has no effect: where an attention reads W + ΔW, as in PEFT.

    Parameters that are targeted by name have it in the weight, see `Method.thinned`.
    """
    drops = [
        site
        for site, method in parts
        if site.rebinds
        and (method.dropout or method.rank_dropout or method.module_dropout)
        and not (site.parameter and site.target == str(site))
    ]
    if drops:
        warnings.warn(
            f"dropout has no effect on {', '.join(map(str, drops[:3]))}"
            f"{' and others' if len(drops) > 3 else ''}: the attention reads their tensors rather "
            "than run them.",
            MultigraftWarning,
            stacklevel=4,
        )


def _resolve_layout(config: PeftConfig, main: Sequence[Need]) -> None:
    """Write into the model's own copy how the (last) linear target stores its weight."""
    shapes = [n.site.geometry for n in main if n.site.geometry and n.site.geometry.is_linear]
    if shapes and hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = shapes[-1].is_transposed


def _resolve_targets(
    model: nn.Module, config: PeftConfig, main: Sequence[Need], spots: Sequence[Spot]
) -> None:
    """Write what "all-linear" and None turned out to mean into the model's own copy."""
    if not isinstance(config, TargetedConfig) or config.target_modules not in (None, "all-linear"):
        return
    chosen = [need.spot for need in main if need.site.parameter is None]
    if not chosen and getattr(config, "target_parameters", None):
        return
    table = METHODS[str(config.peft_type)].default_targets
    usual = default_targets(model, table) if config.target_modules is None else None
    if isinstance(usual, list):
        config.target_modules = list(usual)
    elif config.exclude_modules or config.layers_to_transform is not None:
        # A list of full paths is exact; suffixes could mean more than the filters let through.
        config.target_modules = sorted(spot.path for spot in chosen)
    else:
        config.target_modules = minimal_names(chosen, spots)
