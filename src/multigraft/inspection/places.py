"""Where adapters hang in a model: our adapted layers, and the wrappers that PEFT puts in.

One walk over the module tree as it is. It refuses nothing, so that a model in which the law is
broken can be described; and it imports nothing, so that PEFT's layers are known by their types'
names and read by their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.registry import qualified_name
from multigraft.survey import FOREIGN_ADAPTERS, TRANSPARENT, TRANSPARENT_TYPES
from multigraft.tuner import base_of

HELD_AS = ("base_layer", "original_module")
"""Child names under which wrappers hold what they wrap."""
_NESTED_BY_DESIGN = {
    "peft.tuners.lora.layer.MultiheadAttention": "base_layer.out_proj",
    "peft.tuners.lora.layer.ParamWrapper": "base_layer",
}
"""PEFT's wrappers that hold parts of the same adapter below themselves, and where."""


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter at one place.

    Args:
        tensors: the parameters that it holds there, by name.
        grafts: ours alone.
    """

    name: str
    method: str
    rank: int
    scaling: float
    is_active: bool
    is_merged: bool
    tensors: dict[str, Tensor]
    grafts: tuple[Graft, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether any of its tensors requires gradients."""
        return any(t.requires_grad for t in self.tensors.values())


@dataclass(eq=False)
class Place:
    """A wrapper in the model: what it wraps, and the adapters that it holds.

    Args:
        path: of the wrapper, in the model that was given.
        site: of what it wraps, in the base model.
        layer: the wrapper.
        outer: the wrapper that this one lies inside; the law says: none.
        within: its path in that one.
        inside: wrappers that lie inside this one.
    """

    path: str
    site: str
    layer: nn.Module
    outer: Place | None = None
    within: str = ""
    inside: list[Place] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        """Whether it is an adapted layer."""
        return isinstance(self.layer, AdaptedLayer)

    @property
    def is_nested(self) -> bool:
        """Whether an adapter was put onto another one here."""
        if self.outer is None:
            return False
        own = _NESTED_BY_DESIGN.get(qualified_name(type(self.outer.layer)))
        is_same = type(self.layer).__module__.split(".")[:3] == ["peft", "tuners", "lora"]
        return not (is_same and self.within == own)

    @property
    def base(self) -> nn.Module:
        """The base layer itself, however many wrappers there are around it."""
        return unwrapped(self.layer)

    @property
    def base_parameters(self) -> list[nn.Parameter]:
        """The base layer's own, without those of adapters inside it."""
        return [p for p in self.base.parameters() if id(p) not in self._below]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The adapters here, in order of addition."""
        if isinstance(self.layer, AdaptedLayer):
            return tuple(_our_part(self.layer, name) for name in self.layer.grafts)
        return tuple(_foreign_parts(self.layer, self._below))

    @cached_property
    def _below(self) -> set[int]:
        parts = (part for inner in self.inside for q in inner.all() for part in q.parts)
        return {id(t) for part in parts for t in part.tensors.values()}

    def all(self) -> Iterator[Place]:
        """This place and those inside it, at any depth."""
        yield self
        for place in self.inside:
            yield from place.all()


def root_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model behind handles of ours or of PEFT's, and its path in ``model``."""
    *_, (path, base) = handles(model)
    return base, path


def handles(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model and whatever it is a handle of, down to the base model, each with its path.

    Wrappers of torch (compiled, data-parallel) are seen through.
    """
    path, model = _through("", model)
    yield path, model
    while "base_model" in model._modules:
        base = base_of(model)
        found = getattr(model, "get_base_model", lambda: None)() if base is model else base
        if not isinstance(found, nn.Module) or found is model:
            return
        below = next((name for name, m in model.named_modules() if m is found), "")
        path, model = _through(_join(path, below), found)
        yield path, model


def _through(path: str, model: nn.Module) -> tuple[str, nn.Module]:
    """What wrappers of torch hold, and its path."""
    while TRANSPARENT_TYPES.find(type(model)):
        name = next((n for n in model._modules if n in TRANSPARENT), None)
        child = model._modules[name] if name is not None else None
        if name is None or child is None:
            break
        path, model = _join(path, name), child
    return path, model


def base_view(
    module: nn.Module, path: str, wrapper: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Base path, module and the outermost wrapper around it, for every way that leads to one."""
    held = _held(module)
    if held is not None:
        yield from base_view(held, path, wrapper or module)
        return
    yield path, module, wrapper
    is_transparent = TRANSPARENT_TYPES.find(type(module))
    for name, child in module._modules.items():
        if child is not None:
            same = is_transparent and name in TRANSPARENT
            yield from base_view(child, path if same else _join(path, name), wrapper)


def places(model: nn.Module) -> list[Place]:
    """Wrappers that lie in no other one, each once, in the model's order."""
    base, path = root_of(model)
    return list(_walk(base, path, "", None, "", set()))


def _walk(
    module: nn.Module, path: str, site: str, outer: Place | None, within: str, seen: set[int]
) -> Iterator[Place]:
    """The outermost places at and below ``module``; one inside another goes to its ``inside``."""
    if id(module) in seen:
        return
    seen.add(id(module))
    is_foreign = FOREIGN_ADAPTERS.find(type(module))
    if is_foreign and "token_adapter" in module._modules:  # a hull around the wrapper proper
        inner = module._modules["token_adapter"]
        assert inner is not None
        yield from _walk(inner, _join(path, "token_adapter"), site, outer, within, seen)
        return
    if is_foreign or isinstance(module, AdaptedLayer):
        own = module.path if isinstance(module, AdaptedLayer) else site
        place = Place(path, own, module, outer, within)
        below: set[int] = set()  # what hangs elsewhere too is nested all the same
        for name, child in module.named_children():
            deeper = site if name in HELD_AS else _join(site, name)
            place.inside += _walk(child, _join(path, name), deeper, place, name, below)
        yield place
        return
    is_transparent = TRANSPARENT_TYPES.find(type(module))
    for name, child in module.named_children():
        same = site if is_transparent and name in TRANSPARENT else _join(site, name)
        inner_path = _join(within, name) if outer is not None else ""
        yield from _walk(child, _join(path, name), same, outer, inner_path, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def unwrapped(layer: nn.Module) -> nn.Module:
    """The base layer behind any wrappers."""
    while (held := _held(layer)) is not None:
        layer = held
    return layer


def _held(layer: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for anything else."""
    if not (isinstance(layer, AdaptedLayer) or FOREIGN_ADAPTERS.find(type(layer))):
        return None
    hull = layer._modules.get("token_adapter")
    held = layer._modules if hull is None else hull._modules
    return next((held[name] for name in HELD_AS if held.get(name) is not None), None)


def _our_part(layer: AdaptedLayer, name: str) -> Part:
    grafts = layer.grafts[name]
    main = grafts[0].method
    return Part(
        name=name,
        method="+".join(dict.fromkeys(g.method.name for g in grafts)),
        rank=main.rank,
        scaling=main.scaling,
        is_active=layer.roster.enabled and name in layer.roster.active,
        is_merged=name in layer.merged_adapters,
        tensors={
            f"{number}.{key}" if number else key: tensor
            for number, graft in enumerate(grafts)
            for key, tensor in graft.params.items()
            if isinstance(tensor, nn.Parameter)
        },
        grafts=tuple(grafts),
    )


def _foreign_parts(layer: nn.Module, below: set[int]) -> Iterator[Part]:
    """PEFT's adapters at a wrapper.

    Args:
        below: tensors of wrappers inside this one, which are not its own.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for group in getattr(layer, "adapter_layer_names", ()):
        container: Any = getattr(layer, group, None)
        for name in list(container.keys()) if hasattr(container, "keys") else ():
            own = tensors.setdefault(name, {})
            for key, tensor in _tensors(container[name]):
                if id(tensor) not in below:
                    own[_join(group, key)] = tensor
    is_enabled = not getattr(layer, "disable_adapters", False)
    active, merged = (_names(layer, f"{state}_adapters") for state in ("active", "merged"))
    for name, own in tensors.items():
        yield Part(
            name=name,
            method=_foreign_method(type(layer)),
            rank=int(_of(layer, "r", name, 0)),
            scaling=float(_of(layer, "scaling", name, 1.0)),
            is_active=is_enabled and name in active,
            is_merged=name in merged,
            tensors=own,
        )


def _tensors(held: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(held, Tensor):
        yield "", held
    elif isinstance(held, nn.Module):
        yield from held.named_parameters()


def _names(layer: nn.Module, attribute: str) -> tuple[str, ...]:
    found = getattr(layer, attribute, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _of(layer: nn.Module, attribute: str, adapter: str, default: float) -> float:
    """A number that the wrapper keeps by adapter; ``default`` where it keeps none."""
    table = getattr(layer, attribute, None)
    value = table.get(adapter, default) if isinstance(table, dict) else default
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return value if is_number else default


def _foreign_method(cls: type) -> str:
    """The method by the package that defines the wrapper: ``peft.tuners.lora.layer`` is LORA."""
    for base in cls.__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["peft", "tuners"] and len(parts) > 3:
            return parts[2].upper()
        if base.__name__ == "ModulesToSaveWrapper":
            return "SAVED_MODULE"
    return cls.__name__
