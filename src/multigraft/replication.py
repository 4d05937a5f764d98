"""Replicated layers (`layer_replication`): a deeper model whose layers share the base's weights.

    [[0, 4], [2, 5]]        layers 0 1 2 3 and then 2 3 4: seven, of five

Each replica is a copy of its layer around the very same parameters, so that only adapters tell
replicas apart. They are put in with the first adapter that asks for them, once for all adapters,
and the base's own layers come back with the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from multigraft.errors import StateError, TargetError

if TYPE_CHECKING:
    from multigraft.config import PeftConfig
    from multigraft.roster import Roster

LIST_NAMES = ("layers", "layer", "h", "blocks")
"""What models call the list of their layers."""

Ranges = list[list[int]]
"""First layer and the one after the last, range by range."""


class Replication:
    """A model's list of layers, and the list that stands in for it; neither is in nor out yet.

    Args:
        model: the base model.
        ranges: which layers, in which order.

    Raises:
        TargetError: the model has no list of layers, or several, or fewer layers than named.
    """

    def __init__(self, model: nn.Module, ranges: Ranges) -> None:
        self.ranges = ranges
        path, self.own = _list_of_layers(model)
        self.order = [index for first, end in ranges for index in range(first, end)]
        count = len(self.own)
        if max(self.order) >= count:
            raise TargetError(
                f"`layer_replication` (={ranges}): `{path}` has {count} layers, so ranges end at "
                f"{count} at most. Name layers that there are."
            )
        self.stand_in = _replicas(self.own, self.order, path)
        parents = path.split(".")
        self.parent = model.get_submodule(".".join(parents[:-1]))
        self.name = parents[-1]
        self.fields = _config_fields(model, path, count, self.order)

    def put(self) -> None:
        """Put the replicas in."""
        self.parent._modules[self.name] = self.stand_in
        for config, name, _, value in self.fields:
            setattr(config, name, value)

    def take(self) -> None:
        """Put the base's own layers back, moved and switched as their replicas were since."""
        for replica, index in zip(self.stand_in, self.order, strict=True):
            _follow(self.own[index], replica)
        self.own.training = self.stand_in.training
        self.parent._modules[self.name] = self.own
        for config, name, value, _ in self.fields:
            setattr(config, name, value)

    def settle(self) -> None:
        """Give each replica parameters of its own, for a model that stays as deep as it is."""
        seen: set[int] = set()
        for replica in self.stand_in:
            for module in replica.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in seen:
                        twin = copy.deepcopy(parameter)
                        module._parameters[name] = parameter = twin
                    seen.add(id(parameter))


@contextmanager
def replicated(roster: Roster, config: PeftConfig) -> Iterator[Replication | None]:
    """Show the model as ``config`` wants it, for the length of the block.

    Yields:
        What must be put in with the adapter, or None: nothing is asked for, or it is in already.

    Raises:
        StateError: the model has adapters, and they act on layers that are replicated otherwise.
    """
    wanted, there = getattr(config, "layer_replication", None), roster.replication
    if there is None and not wanted:
        yield None
        return
    if there is not None:
        if wanted and wanted != there.ranges:
            raise StateError(
                f"`layer_replication` (={wanted}): the model's layers are replicated as "
                f"{there.ranges}. Leave it out or give the same, or unload() first."
            )
        if hasattr(config, "layer_replication"):
            config.layer_replication = there.ranges  # its file must say what it was trained on
        yield None
        return
    if roster.configs:
        names = ", ".join(f"`{n}`" for n in roster.configs)
        raise StateError(
            f"`layer_replication` (={wanted}) changes the model itself, and with it what {names} "
            "give. Add the adapter that replicates layers first, or load a base model for it."
        )
    found = Replication(roster.root, wanted or [])
    found.put()
    try:
        yield found
    finally:
        found.take()


def _list_of_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{p}.") for p in found)
        is_named = path.rpartition(".")[2] in LIST_NAMES
        if isinstance(module, nn.ModuleList) and is_named and len(module) and not is_inside:
            found[path] = module
    if len(found) != 1:
        what = f"several lists of layers ({', '.join(found)})" if found else "no list of layers"
        raise TargetError(
            f"`layer_replication`: {type(model).__name__} has {what}; it needs exactly one "
            f"nn.ModuleList called {', '.join(f'`{n}`' for n in LIST_NAMES)}. Leave it out."
        )
    return next(iter(found.items()))


def _replicas(own: nn.ModuleList, order: Sequence[int], path: str) -> nn.ModuleList:
    hooked = next((n for n, m in own.named_modules() if "forward" in m.__dict__), None)
    if hooked is not None:
        raise TargetError(
            f"`layer_replication`: {path}.{hooked} has a `forward` of its own (a device map, say), "
            "which a copy would share. Replicate the layers first, then dispatch the model."
        )
    replicas = []
    for place, index in enumerate(order):
        layer = own[index]
        shared = (*layer.parameters(), *layer.buffers())
        replica = copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
        for module in replica.modules():
            if hasattr(module, "layer_idx"):  # by which transformers' caches tell layers apart
                module.layer_idx = place  # type: ignore[assignment]
        replicas.append(replica)
    stand_in = nn.ModuleList(replicas)
    stand_in.training = own.training
    return stand_in


def _config_fields(
    model: nn.Module, path: str, count: int, order: Sequence[int]
) -> list[tuple[Any, str, Any, Any]]:
    """(config, field, value now, value then) of the configs above the list that count its layers.

    Caches are made from these; the kinds of layers go along with their layers.
    """
    parts = path.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    configs = {id(c): c for m in above if (c := getattr(m, "config", None)) is not None}
    found: list[tuple[Any, str, Any, Any]] = []
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) != count:
            continue
        found.append((config, "num_hidden_layers", count, len(order)))
        kinds = getattr(config, "layer_types", None)
        if isinstance(kinds, list) and len(kinds) == count:
            found.append((config, "layer_types", kinds, [kinds[index] for index in order]))
    return found


def _follow(own: nn.Module, replica: nn.Module) -> None:
    """Give a layer the tensors and the mode that its replica has."""
    for mine, theirs in zip(own.modules(), replica.modules(), strict=True):
        mine.training = theirs.training
        for name in mine._parameters:
            mine._parameters[name] = theirs._parameters[name]
        for name in mine._buffers:
            mine._buffers[name] = theirs._buffers[name]
