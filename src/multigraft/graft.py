"""A graft: one adapter at one site, as the adapted layer holds it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.containers import Leaf, fetch, hold
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.site import Site
from multigraft.whole import whole


@dataclass(eq=False)
class Shared:
    """The tensors that all sites of one adapter share, in one module that hangs at each of them.

    One module, rather than one tensor per site, so that moving the model moves them once.
    """

    specs: dict[str, TensorSpec]
    leaf: Leaf


class Graft:
    """One adapter's method instance at one site, and where its tensors are registered.

    Tensors live in modules, so that ``.to()``, state dicts and optimisers see them; they are read
    through their owners at each use, because conversions and sharding replace them there.

    Args:
        adapter: its name.
        method: its method at the site.
        shared: tensors that all sites of the adapter share.
        tied: the graft whose tensors act here too, where the base's weight is that site's.
    """

    __slots__ = ("adapter", "method", "own_specs", "owners", "shared", "stand_in", "tied")

    def __init__(
        self,
        adapter: str,
        method: Method,
        shared: Shared | None = None,
        tied: Graft | None = None,
    ) -> None:
        self.adapter = adapter
        self.method = method
        self.shared = shared
        self.own_specs = _one_of(tuple(method.tensors().items()))
        self.owners: dict[str, tuple[nn.Module, str]] = {}
        self.stand_in: nn.Module | None = None
        self.tied = tied

    @property
    def site(self) -> Site:
        """The site, with the base layer itself."""
        return self.method.site

    @property
    def params(self) -> Params:
        """The method's tensors by the names that it declared."""
        held = {name: fetch(owner, leaf) for name, (owner, leaf) in self.owners.items()}
        is_theirs = self.tied is not None and self.owners is self.tied.owners
        return self.method.from_tied(held) if is_theirs else held

    def add(
        self,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """``y`` plus this adapter's contribution for the base layer's input ``x``.

        Args:
            where: what broadcasts over ``y``, False where the adapter does not act.
        """
        whole = self.method.add(self.params, y, x, training, base)
        return whole if where is None else torch.where(where, whole, y)

    def specs(self) -> Mapping[str, TensorSpec]:
        """What the method declares; for a stand-in, what the module holds."""
        return self.own_specs if self.shared is None else {**self.own_specs, **self.shared.specs}

    def owns(self, name: str) -> bool:
        """Whether a tensor is this graft's own, rather than that of the site it is tied to."""
        return self.tied is None or (self.method.kind == "replace" and name != "weight")

    def retie(self) -> None:
        """Let a tied copy hold the weight that the copy of the other site holds now."""
        if self.tied is not None and self.stand_in is not None and self.tied.stand_in is not None:
            self.stand_in._parameters["weight"] = self.tied.stand_in._parameters["weight"]

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of the name on disk (relative to the site's path) and the tensor."""
        params = self.params
        for name, spec in self.specs().items():
            if spec.saved:
                yield spec.on_disk or name, params[name]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training may change, whatever their present ``requires_grad``."""
        specs = self.specs()
        for name, tensor in self.params.items():
            if isinstance(tensor, nn.Parameter) and specs[name].trainable:
                yield tensor

    def complete(self) -> None:
        """Give values to what files lack and was made on the meta device, once the rest has some.

        The caller has switched gradients off.
        """
        params = self.params
        lacked = {n for n, s in self.own_specs.items() if s.optional or not s.saved}
        missing = [name for name in lacked & params.keys() if params[name].is_meta]
        if not missing or self.tied or any(params[n].is_meta for n in params.keys() - lacked):
            return
        for name in missing:
            hold(*self.owners[name], torch.empty_like(params[name], device=self.site.device))
        self.method.restore(self.params, missing)

    def snapshot(self) -> Graft:
        """An independent copy of method and tensors: what a merge added, whatever changes since."""
        twin = Graft(self.adapter, copy.copy(self.method), self.shared, self.tied)
        holder = nn.Module()
        for index, (name, tensor) in enumerate(self.params.items()):
            # All of it: what lies in parts is merged into the whole weight.
            own = whole(tensor)
            holder.register_buffer(f"t{index}", own.detach().clone())
            twin.owners[name] = (holder, f"t{index}")
        return twin


@lru_cache(maxsize=1024)
def _one_of(specs: tuple[tuple[str, TensorSpec], ...]) -> Mapping[str, TensorSpec]:
    """One table for all grafts that declare the same: sites of one shape are many."""
    return dict(specs)


def grow(
    graft: Graft, dtype: torch.dtype, device: torch.device, given: Params | None = None
) -> dict[str, Tensor]:
    """Make a graft's own tensors: ``given`` ones are taken as they are, the others initialised.

    When everything is given, nothing is initialised and no random number is drawn. The caller has
    switched gradients off, once for all its sites.

    Returns:
        Names to parameters (buffers where the method says so), on ``device``.
    """
    given = given or {}
    tensors: dict[str, Tensor] = {}
    for name, spec in graft.own_specs.items():
        kind = spec.dtype or dtype
        if name in given:
            value = given[name].to(device=device, dtype=kind)
            value = value.clone() if value is given[name] and not value.is_meta else value
        else:
            value = torch.empty(spec.shape, dtype=kind, device=device)
        if not spec.buffer:
            value = nn.Parameter(value, requires_grad=spec.trainable and value.is_floating_point())
        tensors[name] = value
    if device.type == "meta":
        return tensors
    if not given:
        graft.method.reset(tensors)
    elif len(given) < len(tensors):
        graft.method.restore(tensors, tensors.keys() - given.keys())
    return tensors


def grow_shared(
    method: type[Method],
    config: Any,
    sites: Sequence[Site],
    dtype: torch.dtype,
    device: torch.device,
    given: Params,
) -> Shared | None:
    """Make an adapter's shared tensors, or None when its method has none.

    Args:
        given: values by name that are taken over; nothing is drawn when all are given.
    """
    specs = method.shared_specs(config, sites)
    if not specs:
        return None
    is_complete = all(name in given for name in specs)
    values = dict(given) if is_complete else method.shared_values(config, sites) | dict(given)
    leaf = Leaf()
    for name, spec in specs.items():
        value = values[name].to(device=device, dtype=spec.dtype or dtype)
        hold(leaf, name, value if spec.buffer else nn.Parameter(value, spec.trainable))
        if spec.buffer:
            # Each site's state dict would repeat it; the checkpoint holds it once, if at all.
            leaf._non_persistent_buffers_set.add(name)
    return Shared(specs, leaf)
