"""Modules and weights that the base model uses in more than one place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from multigraft.inspection.checks.contract import Subject, Violation, check
from multigraft.inspection.places import Place, unwrapped
from multigraft.layer import AdaptedLayer


@check("shared module")
def shared_modules(subject: Subject) -> Iterator[Violation]:
    """One module in several places, with its adapters in some of them only."""
    wrapped = {id(m): w for _, m, w in subject.base_modules if w is not None}
    for site, module, wrapper in subject.base_modules:
        if wrapper is None and id(module) in wrapped:
            yield Violation(
                "shared module",
                subject.at(site),
                "this module is adapted where the model uses it elsewhere, but not here.",
                "Put the same wrapper in both places; Multigraft does so when it adapts the model.",
            )


@check("shared weight")
def shared_weights(subject: Subject) -> Iterator[Violation]:
    """One weight in several modules, with an adapter at some of them only."""
    holders: dict[int, dict[int, tuple[str, nn.Module]]] = {}
    for site, module, _ in subject.base_modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), {}).setdefault(id(module), (site, module))
    names: dict[int, set[str]] = {}
    for place in subject.places:
        names.setdefault(id(place.base), set()).update(part.name for part in place.parts)
    for place in subject.outermost:
        shared = (holders.get(id(p), {}) for p in place.base._parameters.values() if p is not None)
        others = {key: value for each in shared for key, value in each.items()}
        for site, module in others.values():
            missing = names.get(id(place.base), set()) - names.get(id(module), set())
            if module is not place.base and missing:
                yield _one_sided(subject, place, site, missing)


def _one_sided(subject: Subject, place: Place, site: str, missing: set[str]) -> Violation:
    which = ", ".join(f"`{name}`" for name in sorted(missing))
    problem = f"shares a weight with {subject.at(site)}, where {which} does not act"
    if place.is_ours:  # merging gives the layer a weight of its own
        return Violation(
            "shared weight",
            place.path,
            f"{problem}: the two differ while the adapter acts, and part when it is merged.",
            "Nothing, if that is meant; else target both, or neither.",
            is_note=True,
        )
    return Violation(
        "shared weight",
        place.path,
        f"{problem}: merging would change both.",
        "Target both, or neither, or do not merge.",
    )


@check("torn ties")
def torn_ties(subject: Subject) -> Iterator[Violation]:
    """Input and output embeddings that the model's config ties, and that hold two weights."""
    config = getattr(subject.base, "config", None)
    find = getattr(subject.base, "get_input_embeddings", None)
    if not getattr(config, "tie_word_embeddings", False) or not callable(find):
        return
    layers = [place.layer for place in subject.places]
    if any(isinstance(layer, AdaptedLayer) and layer.parted for layer in layers):
        return  # for the time of a merge only
    head = getattr(subject.base, "get_output_embeddings", lambda: None)()
    words = find()
    if not (isinstance(words, nn.Module) and isinstance(head, nn.Module)):
        return
    own, other = (unwrapped(m)._parameters.get("weight") for m in (words, head))
    if own is not None and other is not None and own is not other:
        path = next(p for p, m, _ in subject.base_modules if m is unwrapped(head))
        yield Violation(
            "torn ties",
            subject.at(path),
            "the output embedding holds a weight of its own, though the model's config ties it to "
            "the input embedding: the two drift apart, and loading will tie them again.",
            "Call model.tie_weights() on the base before adapting it; or, if two weights are "
            "meant, set model.config.tie_word_embeddings = False.",
        )
