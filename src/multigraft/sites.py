"""Which sites a config means on a model: pure, it changes neither.

Names are matched against base paths alone (`multigraft.survey`), by whole path components:
``q_proj`` matches ``layers.0.q_proj`` and never ``layers.0.my_q_proj`` or an adapter's tensors.
A name that means nothing is an error with the nearest real ones, not a silent omission; files of
other libraries are read with ``lenient=True``, where it is a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from multigraft.bases import geometry_of
from multigraft.config import PeftConfig, TargetedConfig, TaskType, matching_pattern
from multigraft.defaults import TASK_HEADS, default_targets
from multigraft.errors import MultigraftWarning, TargetError, did_you_mean, there_are
from multigraft.methods import METHODS
from multigraft.needs import (
    Need,
    module_needs,
    name_on_disk,
    need_at,
    note_shared,
    parameter_needs,
)
from multigraft.survey import Spot
from multigraft.tokens import token_needs, with_ties

HEAD_NAMES = ("score", "classifier")
"""Heads of sequence classifiers, which transformers initialises afresh."""


def find(
    model: nn.Module, config: PeftConfig, spots: Sequence[Spot], *, lenient: bool = False
) -> list[Need]:
    """Everything that ``config`` means on ``model``, in the order of the model's modules.

    Args:
        spots: the model's base view, from `multigraft.survey.survey`.
        lenient: warn, rather than fail, about names that match nothing beside others that do.

    Raises:
        TargetError: nothing matches; a name matches nothing; a matched module cannot be adapted.
    """
    _refuse_hidden(config, spots)
    saved = _saved(config, spots, lenient)
    if not isinstance(config, TargetedConfig):
        return saved
    main = METHODS[str(config.peft_type)]
    taken = {id(s) for s in spots if any(_is_within(s, need.spot) for need in saved)}
    free = [spot for spot in spots if id(spot) not in taken]
    named = getattr(config, "target_parameters", None) or ()
    parameters = parameter_needs(named, main, free, lenient) if named else []
    targets = _targets(model, config, spots, taken, parameters, lenient)
    needs = _once([need for spot in targets for need in module_needs(spot, main)])
    needs += _beside(needs, parameters)
    _check_patterns(config, [need.site.target for need in needs], lenient)
    tokens = token_needs(model, config, spots, taken)
    needs = with_ties([*needs, *tokens], spots) + saved + _biases(config, needs, spots, taken)
    if not needs:
        raise TargetError(
            "the config means no module at all: `target_modules` (=[]), and nothing else to train. "
            "Name modules to adapt, or in `modules_to_save`."
        )
    name_on_disk(needs, main)
    note_shared(needs, spots)
    return needs


def minimal_names(targets: Iterable[Spot], spots: Sequence[Spot]) -> list[str] | str:
    """The shortest that means exactly these modules: last components, or paths.

    Where one path ends like that of a module which is not meant, only an expression is exact.
    """
    chosen = {id(spot) for spot in targets}
    names = sorted({spot.path.rpartition(".")[2] for spot in spots if id(spot) in chosen})
    lookup = set(names)
    exact = all(
        id(spot) in chosen or not any(p.rpartition(".")[2] in lookup for p in spot.paths)
        for spot in spots
    )
    if exact:
        return names
    paths = sorted(spot.path for spot in spots if id(spot) in chosen)
    others = [p for spot in spots if id(spot) not in chosen for p in spot.paths]
    if any(_matches(paths, p) for p in others):
        return "|".join(map(re.escape, paths))
    return paths


def _targets(
    model: nn.Module,
    config: TargetedConfig,
    spots: Sequence[Spot],
    taken: set[int],
    parameters: Sequence[Need],
    lenient: bool,
) -> list[Spot]:
    wanted = config.target_modules
    if wanted is None:
        wanted = _default_targets(model, config, parameters)
    _check_layers(config, spots, lenient)
    if wanted == "all-linear":
        found = _all_linear(model, config, spots)
    else:
        found = [s for s in spots if any(_matches(wanted, p) for p in s.paths)]
        _check_names("target_modules", wanted, spots, found, lenient)
        found = [s for s in found if _in_layers(config, s, wanted, lenient)]
    excluded = config.exclude_modules
    if excluded:
        without = [s for s in found if not any(_matches(excluded, p) for p in s.paths)]
        _check_names("exclude_modules", excluded, spots, spots, lenient)
        found = without
    found = [s for s in found if id(s) not in taken]
    if not found and wanted != []:
        raise TargetError(
            f"no module is left to adapt: `target_modules` (={config.target_modules!r}), "
            f"`exclude_modules` (={excluded!r}), `layers_to_transform` "
            f"(={config.layers_to_transform!r}), `modules_to_save` (={config.modules_to_save!r}). "
            "Loosen one of them."
        )
    return found


def _default_targets(
    model: nn.Module, config: TargetedConfig, parameters: Sequence[Need]
) -> list[str] | str:
    """The usual modules; none beside parameters that PEFT would let stand alone."""
    if any(need.site.geometry and need.site.geometry.name == "experts" for need in parameters):
        return []
    try:
        return default_targets(model, METHODS[str(config.peft_type)].default_targets)
    except TargetError:
        if parameters:
            return []
        raise


def _all_linear(model: nn.Module, config: TargetedConfig, spots: Sequence[Spot]) -> list[Spot]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "base_layer", head)
    is_classifier = head is None and config.task_type == TaskType.SEQ_CLS
    found = []
    for spot in spots:
        geometry = geometry_of(spot.layer)
        is_head = spot.layer is head or (is_classifier and spot.path in HEAD_NAMES)
        if geometry is None or not geometry.is_linear or is_head:
            continue
        if _in_layers(config, spot, "all-linear", lenient=True):
            found.append(spot)
    if not found:
        raise TargetError(
            f'`target_modules` (="all-linear"): {type(model).__name__} has no linear layer besides '
            "its output head. Name the modules to adapt."
        )
    return found


def _matches(wanted: list[str] | str, path: str) -> bool:
    """Whole-path regular expression for a string, dotted suffix for a list."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _check_names(
    field: str, wanted: list[str] | str, spots: Sequence[Spot], found: Sequence[Spot], lenient: bool
) -> None:
    paths = [p for s in found for p in s.paths]
    if isinstance(wanted, str):
        if not any(_matches(wanted, p) for p in paths):
            hint = there_are((s.path for s in spots if s.layer._parameters), limit=4)
            if any(_matches([wanted], p) for s in spots for p in s.paths):
                hint = f" As a name it must stand in a list: {field}=[{wanted!r}]."
            raise TargetError(
                f"`{field}` (={wanted!r}): the expression matches no module's whole path.{hint}"
            )
        return
    missing = [name for name in wanted if not any(_matches([name], p) for p in paths)]
    if not missing:
        return
    known = {p.rpartition(".")[2] for s in spots for p in s.paths} | {s.path for s in spots}
    usable = {s.path.rpartition(".")[2] for s in spots if s.layer._parameters}
    hints = "".join(did_you_mean(name, known) for name in missing) or there_are(usable)
    message = f"`{field}`: no module is called {', '.join(f'`{n}`' for n in missing)}.{hints}"
    if lenient and len(missing) < len(wanted):
        warnings.warn(message, MultigraftWarning, stacklevel=2)
    else:
        raise TargetError(message)


def _layer_index(config: TargetedConfig, path: str) -> int | None:
    """The index of the layer that a path lies in, by ``layers_pattern`` or the first number."""
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", path)
        if match:
            return int(match.group(1))
    return None


def _check_layers(config: TargetedConfig, spots: Sequence[Spot], lenient: bool) -> None:
    """Fail for layer indices that no layer of the model has."""
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return
    there = {i for s in spots for p in s.paths if (i := _layer_index(config, p)) is not None}
    missing = sorted(({indices} if isinstance(indices, int) else set(indices)) - there)
    if not missing:
        return
    known = f"there are {min(there)} to {max(there)}" if there else "no layer has an index"
    message = f"`layers_to_transform` (={indices!r}): there are no layers {missing}; {known}"
    if config.layers_pattern:
        message += f" in `layers_pattern` (={config.layers_pattern!r})"
    if not lenient:
        raise TargetError(f"{message}. Give indices of the model's layers.")
    warnings.warn(f"{message}.", MultigraftWarning, stacklevel=2)


def _in_layers(config: TargetedConfig, spot: Spot, wanted: list[str] | str, lenient: bool) -> bool:
    """Whether ``layers_to_transform`` lets this module in."""
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return True
    allowed = {indices} if isinstance(indices, int) else set(indices)
    is_in = _layer_index(config, spot.path) in allowed
    if not is_in and isinstance(wanted, list) and spot.path in wanted:
        # PEFT lets a full path pass whatever the indices; its files keep that meaning.
        if lenient:
            return True
        raise TargetError(
            f"`target_modules` names {spot.path} in full, but `layers_to_transform` (={indices!r}) "
            "leaves it out. Drop one of the two."
        )
    return is_in


def _once(needs: Sequence[Need]) -> list[Need]:
    """Without repeats: a layer may be targeted by itself and as a part of another."""
    found: dict[tuple[int, str], Need] = {}
    for need in needs:
        found.setdefault((id(need.spot), need.site.tensor_name), need)
    return list(found.values())


def _beside(needs: Sequence[Need], more: list[Need]) -> list[Need]:
    """``more``, unless it acts on the same tensors."""
    known = {(id(need.spot), need.site.tensor_name) for need in needs}
    for need in more:
        if (id(need.spot), need.site.tensor_name) in known:
            raise TargetError(
                f"`target_parameters` names {need.site.path}.{need.site.tensor_name}, which "
                "`target_modules` means as well. Leave it out of one of the two."
            )
    return more


def _saved(config: PeftConfig, spots: Sequence[Spot], lenient: bool) -> list[Need]:
    """`modules_to_save`, module by module.

    A container is saved through its leaves, so that other adapters can still act on each of them.
    """
    wanted = getattr(config, "modules_to_save", None)
    if not wanted:
        return []
    method = METHODS["SAVED_MODULE"]
    found = [s for s in spots if any(_matches(wanted, p) for p in s.paths)]
    # A task's usual heads stand in every config of that task, whichever of them the model has.
    usual = TASK_HEADS.get(str(config.task_type), ())
    _check_names("modules_to_save", [n for n in wanted if n not in usual], spots, found, lenient)
    parts: dict[int, Spot] = {}
    wholes: list[Spot] = []
    for spot in found:
        if any(_is_within(spot, other) for other in wholes):
            continue  # copied with the module that holds it
        inside = [s for s in spots if s is spot or s.path.startswith(f"{spot.path}.")]
        owners = [s for s in inside if _own_tensors(s.layer)]
        if not owners:
            raise TargetError(f"`modules_to_save`: {spot.path} has no parameters to train.")
        whole = any(s.layer._modules for s in owners)
        if whole and any(s.wrapper for s in inside if s is not spot):
            raise TargetError(
                f"`modules_to_save`: {spot.path} holds parameters of its own beside modules that "
                "are adapted, so it cannot be copied as a whole. Save its parts by name."
            )
        wholes += [spot] if whole else []
        parts |= {id(s): s for s in ([spot] if whole else owners)}
    return [need_at(s, method, geometry=geometry_of(s.layer)) for s in parts.values()]


def _refuse_hidden(config: PeftConfig, spots: Sequence[Spot]) -> None:
    """Fail when the config means a module inside one that another adapter copied whole.

    The copy takes its place, so an adapter there would act or not depending on who else is active.
    """
    saved = getattr(config, "modules_to_save", None)
    for spot in spots:
        owners = _copied_by(spot) if spot.layer._modules else ""
        if not owners or (saved and any(_matches(saved, path) for path in spot.paths)):
            continue  # nobody's, or this config copies it whole as well
        for name, module in spot.layer.named_modules():
            path = f"{spot.path}.{name}"
            if name and name not in spot.hosted and _means(config, path, module):
                raise TargetError(
                    f"{path} lies inside {spot.path}, of which {owners} trains a whole copy "
                    "(`modules_to_save`). Leave it out with `exclude_modules`, or delete that "
                    "adapter first."
                )


def _copied_by(spot: Spot) -> str:
    """The adapters that train a whole copy of this module."""
    grafts = spot.wrapper.all_grafts() if spot.wrapper is not None else ()
    copies = [g for g in grafts if g.method.kind == "replace" and not g.site.inner]
    return ", ".join(f"`{g.adapter}`" for g in copies)


def _means(config: PeftConfig, path: str, module: nn.Module) -> bool:
    """Whether the config asks for this module, which is hidden from the base view."""
    saved = getattr(config, "modules_to_save", None)
    if saved and _matches(saved, path):
        return True
    if not isinstance(config, TargetedConfig):
        return False
    if config.exclude_modules and _matches(config.exclude_modules, path):
        return False
    wanted = config.target_modules
    if wanted == "all-linear":
        geometry = geometry_of(module)
        return geometry is not None and geometry.is_linear
    return bool(wanted) and _matches(wanted or [], path)


def _is_within(spot: Spot, whole: Spot) -> bool:
    return spot is whole or any(spot.path.startswith(f"{path}.") for path in whole.paths)


def _own_tensors(layer: nn.Module) -> bool:
    own = (*layer._parameters.values(), *layer._buffers.values())
    return any(t is not None for t in own) or is_parametrized(layer)


def _biases(
    config: TargetedConfig, needs: Sequence[Need], spots: Sequence[Spot], taken: set[int]
) -> list[Need]:
    kind = getattr(config, "bias", "none")
    if kind == "none":
        return []
    method = METHODS["BIAS"]
    adapted = {id(need.spot) for need in needs}
    if kind == "lora_only":
        holders: Sequence[Spot] = list({id(n.spot): n.spot for n in needs}.values())
    else:
        holders = spots
    return [
        need_at(spot, method, "bias")
        for spot in holders
        if isinstance(getattr(spot.layer, "bias", None), Tensor)
        and id(spot) not in taken
        and (id(spot) in adapted or spot.layer._modules == {})
    ]


def _check_patterns(config: TargetedConfig, paths: list[str], lenient: bool) -> None:
    for field in config.site_patterns:
        patterns = getattr(config, field, None) or {}
        unused = [k for k in patterns if not any(matching_pattern({k: 0}, p) for p in paths)]
        if unused:
            known = {p.rpartition(".")[2] for p in paths} | set(paths)
            hints = "".join(did_you_mean(k, known) for k in unused) or there_are(known)
            message = (
                f"`{field}`: {', '.join(f'`{k}`' for k in unused)} match no adapted module.{hints}"
            )
            if not lenient:
                raise TargetError(message)
            warnings.warn(message, MultigraftWarning, stacklevel=2)
