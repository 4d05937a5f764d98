"""What one target means: the sites of a module or of a parameter, and their names in files.

A module is its weight, or the several tensors that it is made of (an attention). A parameter is a
site by itself; several parameters of one module are several sites at one adapted layer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from multigraft.bases import Geometry, geometry_of, parameter_geometry
from multigraft.errors import MultigraftWarning, TargetError, listed, nearest_of
from multigraft.methods import Method
from multigraft.site import Site
from multigraft.storage import DENSE, FOREIGN, storage_of
from multigraft.survey import Spot


@dataclass(eq=False)
class Need:
    """One thing that a config asks for: this method at this site."""

    site: Site
    method: type[Method]
    spot: Spot


def need_at(
    spot: Spot,
    method: type[Method],
    parameter: str | None = None,
    geometry: Geometry | None = None,
    *,
    target: str = "",
    label: str = "",
) -> Need:
    """The site of one tensor of a module; where the module never runs, its host is wrapped."""
    if spot.is_hosted and (spot.host is None or len({id(p) for p, _ in spot.places}) > 1):
        raise TargetError(
            f"{method.name} cannot adapt {spot.path}: it never runs, its parent reads its tensors, "
            "and that parent is the model itself or one of several. Put the parent into a module, "
            "or give each parent a layer of its own."
        )
    # While adapters are merged, the base's own tensors are what its wrapper kept of them.
    wrapper = (spot.host or spot).wrapper
    site = Site(
        path=spot.path,
        layer=spot.layer,
        geometry=geometry,
        storage=storage_of(spot.layer, parameter or "weight"),
        parameter=parameter,
        kept=wrapper.kept if wrapper is not None else {},
        inner=spot.inner,
        target=target,
        label=spot.inner or label,
    )
    return Need(site, method, spot)


def module_needs(spot: Spot, method: type[Method]) -> Iterator[Need]:
    """What it means to target a module.

    Raises:
        TargetError: the method does not act on this kind of layer.
    """
    geometry = geometry_of(spot.layer)
    if method.kind == "replace":
        yield need_at(spot, method, geometry=geometry)
        return
    where = f"{method.name} cannot adapt {spot.path} ({type(spot.layer).__name__})"
    refusal = geometry.whole_refusal(spot.layer) if geometry is not None else None
    if refusal:
        raise TargetError(f"{where}: {refusal}.")
    parts = geometry.parts(spot.layer) if geometry is not None else ()
    if not parts or any(part.geometry.name not in method.geometries for part in parts):
        able = ", ".join(sorted(method.geometries))
        raise TargetError(
            f"{where}: it adapts layers of the kinds {able}. Name such layers in "
            "`target_modules`, or leave this one out with `exclude_modules`."
        )
    for part in parts:
        held = spot.hosted[part.inner] if part.inner else spot
        label = (part.parameter or "") if len(parts) > 1 else ""
        need = need_at(held, method, part.parameter, part.geometry, target=spot.path, label=label)
        need.site.times = part.times
        if need.site.rebinds:
            _refuse_unplain(held.layer, need.site.tensor_name, where)
        yield need


def note_shared(needs: Sequence[Need], spots: Sequence[Spot]) -> None:
    """Tell each site which of its parameters other modules of the base hold as well."""
    held: dict[int, list[nn.Module]] = {}
    for spot in spots:
        is_closed = spot.wrapper is not None and spot.layer._modules
        for module in spot.layer.modules() if is_closed else (spot.layer,):
            for parameter in module._parameters.values():
                if parameter is not None:
                    held.setdefault(id(parameter), []).append(module)
    shared = {key: modules for key, modules in held.items() if len(modules) > 1}
    for need in needs if shared else ():
        for name, parameter in need.site.layer.named_parameters():
            if id(parameter) in shared:
                need.site.shared[name] = shared[id(parameter)]


def parameter_needs(
    wanted: Sequence[str], method: type[Method], spots: Sequence[Spot], lenient: bool
) -> list[Need]:
    """What it means to target parameters: names, or ends of dotted paths, as PEFT matches them.

    Raises:
        TargetError: a name matches nothing; a matched parameter cannot be adapted.
    """
    named = [
        (spot, name, [f"{path}.{name}" for path in spot.paths])
        for spot in spots
        for name in _parameter_names(spot.layer)
    ]
    found = [(s, n, paths) for s, n, paths in named if any(_ends(p, wanted) for p in paths)]
    known = [path for _, _, paths in named for path in paths]
    _check_found(wanted, [p for _, _, paths in found for p in paths], known, lenient)
    several = {key for key, count in Counter(id(s) for s, _, _ in found).items() if count > 1}
    return [_parameter_need(s, n, method, id(s) in several) for s, n, _ in found]


def name_on_disk(needs: Sequence[Need], main: type[Method]) -> None:
    """Give each site the path under which PEFT's files hold its tensors.

    PEFT wraps a module once for each of its targets, in the order of its parameters, and each
    wrapper puts ``base_layer`` between the module's name and whatever lies inside: a wrapped bias,
    a layer inside a wrapped attention, the factors of every parameter but the last one.
    """
    depth: Counter[str] = Counter()
    level: dict[int, int] = {}
    for need in needs:
        if need.method is main:
            depth[need.spot.path] += 1
            level[id(need)] = depth[need.spot.path]
    for need in needs:
        inside = depth[need.spot.path] - level[id(need)] if id(need) in level else None
        if inside is None:
            inside = depth[need.spot.path] if need.site.parameter else 0
        need.site.disk = _nested(need.spot.path, depth) + ".base_layer" * inside


def _nested(path: str, depth: Counter[str]) -> str:
    """A base path as it is below the wrappers of the modules that it lies in."""
    parts = path.split(".")
    shown = parts[0]
    for index in range(1, len(parts)):
        shown += ".base_layer" * depth[".".join(parts[:index])] + f".{parts[index]}"
    return shown


def _parameter_need(spot: Spot, name: str, method: type[Method], is_one_of_several: bool) -> Need:
    path = f"{spot.path}.{name}"
    where = f"{method.name} cannot adapt the parameter {path}"
    _refuse_unplain(spot.layer, name, where)
    inside = [n for n, m in spot.layer.named_modules() if n and _owns_tensors(m)]
    if any(n not in spot.hosted for n in inside):
        raise TargetError(
            f"{where}: its module holds layers of its own ({', '.join(inside[:3])}), which "
            "adapters could be asked to act on. Target those layers instead."
        )
    geometry = parameter_geometry(spot.layer, name)
    if geometry is None:
        shape = tuple(getattr(spot.layer, name).shape)
        raise TargetError(f"{where}: its shape is {shape}, and only 2 or 3 dimensions can be.")
    if geometry.name not in method.geometries:
        raise TargetError(f"{where}: it is a stack of {geometry.name}. Use LoRA for those.")
    label = name if is_one_of_several else ""
    return need_at(spot, method, name, geometry, target=path, label=label)


def _refuse_unplain(layer: nn.Module, name: str, where: str) -> None:
    """Fail unless the tensor can be exchanged for another one while its module runs."""
    held, storage = layer._parameters.get(name), storage_of(layer, name)
    if held is None:
        raise TargetError(
            f"{where}: `{name}` is not a plain parameter but computed from others, so nothing can "
            "stand in its place. Make it plain first (remove the parametrisation or the hook)."
        )
    if storage not in (DENSE, FOREIGN) or not held.is_floating_point():
        raise TargetError(
            f"{where}: `{name}` is stored as {storage.name} {held.dtype}, and its module reads it "
            "as it is stored. Load the model with this tensor in a floating dtype."
        )


def _parameter_names(layer: nn.Module) -> list[str]:
    """Names of what a module reads as its parameters, parametrised ones included."""
    own = [name for name, tensor in layer._parameters.items() if tensor is not None]
    computed = layer._modules.get("parametrizations")
    return [*own, *(computed if isinstance(computed, nn.ModuleDict) else ())]


def _ends(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _check_found(
    wanted: Sequence[str], found: Sequence[str], known: Sequence[str], lenient: bool
) -> None:
    missing = [name for name in wanted if not any(_ends(path, [name]) for path in found)]
    if not missing:
        return
    ends = {path.rpartition(".")[2] for path in known} | set(known)
    hints = nearest_of(missing, ends)
    message = f"`target_parameters`: no parameter of a module is called {listed(missing)}.{hints}"
    if not lenient or len(missing) == len(wanted):
        raise TargetError(message)
    warnings.warn(message, MultigraftWarning, stacklevel=2)


def _owns_tensors(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
