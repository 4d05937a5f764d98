"""An adapter is at every site that its config means."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from multigraft.errors import MultigraftError
from multigraft.inspection.checks.contract import Subject, Violation, check
from multigraft.roster import Roster
from multigraft.sites import find
from multigraft.survey import survey

_LAW = "uncovered sites"


@check(_LAW)
def uncovered_sites(subject: Subject) -> Iterator[Violation]:
    """Sites that a config means and the adapter is not at."""
    roster = subject.roster
    if roster is not None and not any(place.inside for place in subject.places):
        for name in roster.configs:
            yield from _ours(subject, roster, name)
    for name, config in subject.foreign_configs.items():
        yield from _foreign(subject, name, config)


def _ours(subject: Subject, roster: Roster, name: str) -> Iterator[Violation]:
    if roster.context_of(name) is not None:
        return
    config = roster.configs[name]
    hanging = {id(place.layer) for place in subject.places}
    layers = [layer for layer in roster.layers[name] if id(layer) in hanging]
    there = {str(graft.site) for layer in layers for graft in layer.grafts.get(name, ())}
    lost = [x.path for x in roster.layers[name] if id(x) not in hanging or name not in x.grafts]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            needs = find(roster.root, config, survey(roster.root), lenient=True)
    except MultigraftError as error:
        yield Violation(
            _LAW,
            subject.base_path,
            f"the config of `{name}` means nothing on this model: {error}",
            "Correct the config, delete the adapter and add it again.",
        )
        return
    meant = {str(need.site): need.site.host_path for need in needs}
    missing = {site: path for site, path in meant.items() if site not in there}
    for site in dict.fromkeys([*missing, *lost]):
        yield _missing(subject, name, site)


def _foreign(subject: Subject, name: str, config: Any) -> Iterator[Violation]:
    """By PEFT's rule: a string is an expression for whole paths, a list holds their ends."""
    wanted = getattr(config, "target_modules", None)
    is_filtered = getattr(config, "layers_to_transform", None) is not None
    if not wanted or is_filtered or not isinstance(wanted, (str, list, tuple, set)):
        return
    own = [p for p in subject.places if any(part.name == name for part in p.parts)]
    covered = {place.site for place in own}
    kinds = {type(place.base) for place in own}
    copied = tuple(getattr(config, "modules_to_save", None) or ())
    excluded = getattr(config, "exclude_modules", None) or ()
    for site, module, _ in subject.base_modules:
        if type(module) not in kinds or site in covered or not _matches(wanted, site):
            continue
        is_left_out = _matches(excluded, site) or _is_within(copied, site)
        if not is_left_out and not _is_shared(subject, module, covered):
            yield _missing(subject, name, site)


def _missing(subject: Subject, name: str, site: str) -> Violation:
    return Violation(
        _LAW,
        subject.at(site),
        f"`{name}` does not act here, though its config means this site.",
        f"Delete `{name}` and add it again, or narrow `target_modules` to what it is to cover.",
    )


def _is_shared(subject: Subject, module: nn.Module, covered: set[str]) -> bool:
    """Whether the module is adapted under another path; that is another check's concern."""
    return any(m is module and site in covered for site, m, _ in subject.base_modules)


def _matches(wanted: Any, site: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, site) is not None
    return any(site == end or site.endswith(f".{end}") for end in wanted)


def _is_within(names: tuple[str, ...], site: str) -> bool:
    """Whether the site is, or lies in, a module whose path ends in one of these names."""
    parts = site.split(".")
    return any(_matches(names, ".".join(parts[:n])) for n in range(1, len(parts) + 1))
