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
from multigraft.config import PeftConfig, TargetedConfig, matching_pattern
from multigraft.defaults import TASK_HEADS, default_targets
from multigraft.errors import MultigraftWarning, TargetError, listed, nearest_of, there_are
from multigraft.methods import METHODS, Method
from multigraft.needs import (
    Need,
    module_needs,
    name_on_disk,
    need_at,
    note_shared,
    parameter_needs,
)
from multigraft.survey import Spot
from multigraft.targeting import Rule, Verdict, check_names, choose, matches
from multigraft.tokens import token_needs, warn_of_no_ties, with_ties


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
    ensure = bool(getattr(config, "ensure_weight_tying", False))
    saved = with_ties(_saved(config, spots, lenient), spots, ensure)
    if not isinstance(config, TargetedConfig):
        return saved
    main = METHODS[str(config.peft_type)]
    taken = _taken(saved, spots)
    parameters = _parameters(config, main, spots, taken, lenient)
    rule = _rule(model, config, taken, parameters, lenient)
    targets = choose(rule, spots, lenient=lenient)
    needs = _once([need for spot in targets for need in module_needs(spot, main)])
    needs += _beside(needs, parameters)
    _check_patterns(config, [need.site.target for need in needs], lenient)
    tokens = token_needs(model, config, spots, taken)
    needs = with_ties([*needs, *tokens], spots, ensure) + saved
    needs += _biases(config, needs, spots, taken)
    if ensure and not any(need.site.tied for need in needs):
        warn_of_no_ties()
    if not needs:
        raise TargetError(
            "the config means no module at all: `target_modules` (=[]), and nothing else to train. "
            "Name modules to adapt, or in `modules_to_save`."
        )
    name_on_disk(needs, main)
    note_shared(needs, spots)
    return needs


def verdicts(model: nn.Module, config: TargetedConfig, spots: Sequence[Spot]) -> list[Verdict]:
    """What `find` decides on each module before it asks whether the method can act there.

    Raises:
        TargetError: another field of the config means nothing, so nothing is decided.
    """
    taken = _taken(_saved(config, spots, lenient=True), spots)
    main = METHODS[str(config.peft_type)]
    parameters = _parameters(config, main, spots, taken, lenient=True)
    return _rule(model, config, taken, parameters, lenient=False).verdicts(spots)


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
    if any(matches(paths, p) for p in others):
        return "|".join(map(re.escape, paths))
    return paths


def _taken(saved: Sequence[Need], spots: Sequence[Spot]) -> set[int]:
    """Identities of the modules that the adapter copies whole, and of what they hold."""
    return {id(s) for s in spots if any(_is_within(s, need.spot) for need in saved)}


def _parameters(
    config: PeftConfig, main: type[Method], spots: Sequence[Spot], taken: set[int], lenient: bool
) -> list[Need]:
    """What ``target_parameters`` means."""
    named = getattr(config, "target_parameters", None) or ()
    free = [spot for spot in spots if id(spot) not in taken]
    return parameter_needs(named, main, free, lenient) if named else []


def _rule(
    model: nn.Module,
    config: TargetedConfig,
    taken: set[int],
    parameters: Sequence[Need],
    lenient: bool,
) -> Rule:
    """What the config says of its targets here."""
    wanted = config.target_modules
    if wanted is None:
        wanted = _default_targets(model, config, parameters)
    return Rule(model, config, wanted, taken, lenient)


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
    found = [s for s in spots if any(matches(wanted, p) for p in s.paths)]
    # A task's usual heads stand in every config of that task, whichever of them the model has.
    usual = TASK_HEADS.get(str(config.task_type), ())
    check_names("modules_to_save", [n for n in wanted if n not in usual], spots, found, lenient)
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
        if not owners or (saved and any(matches(saved, path) for path in spot.paths)):
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
    if saved and matches(saved, path):
        return True
    if not isinstance(config, TargetedConfig):
        return False
    if config.exclude_modules and matches(config.exclude_modules, path):
        return False
    wanted = config.target_modules
    if wanted == "all-linear":
        geometry = geometry_of(module)
        return geometry is not None and geometry.is_linear
    return bool(wanted) and matches(wanted or [], path)


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
            hints = nearest_of(unused, known) or there_are(known)
            message = f"`{field}`: {listed(unused)} match no adapted module.{hints}"
            if not lenient:
                raise TargetError(message)
            warnings.warn(message, MultigraftWarning, stacklevel=2)
