"""The numbers themselves: finite, where they belong, and of a likely size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from multigraft.finite import is_finite
from multigraft.inspection.checks.contract import Subject, Violation, check
from multigraft.inspection.places import Part, Place
from multigraft.storage import holder, storage_of

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""How PEFT's low-rank pairs are called."""


@check("non-finite values")
@torch.no_grad()
def non_finite_values(subject: Subject) -> Iterator[Violation]:
    """NaN or infinity in any parameter, of the base or of an adapter, that is a plain tensor."""
    for path, parameter in subject.model.named_parameters():
        if _has_values(parameter) and parameter.numel() and not is_finite(parameter):
            yield Violation(
                "non-finite values",
                path,
                "holds NaN or infinity, so everything that it takes part in does.",
                "Load it again from a good checkpoint, or delete the adapter that it belongs to.",
            )


@check("device or dtype")
def devices_and_dtypes(subject: Subject) -> Iterator[Violation]:
    """Adapter tensors where the base layer is not, or in a dtype that fits nothing beside them."""
    for place, part in subject.parts:
        tensors = [t for t in part.tensors.values() if t.is_floating_point()]
        found = [
            *_misplaced(part, tensors, place.base_parameters),
            *_mistyped(place, part, tensors),
        ]
        for problem, remedy in found:
            yield Violation("device or dtype", place.path, problem, remedy)


@check("dead adapters")
@torch.no_grad()
def dead_adapters(subject: Subject) -> Iterator[Violation]:
    """Sites at which an adapter adds nothing at all; new ones do so everywhere, until trained."""
    sizes: dict[str, list[tuple[Place, float]]] = {}
    for place, part in subject.parts:
        size = _delta_norm(part)
        if size is not None:
            sizes.setdefault(part.name, []).append((place, size))
    for name, found in sizes.items():
        if not any(size for _, size in found):
            yield Violation(
                "dead adapters",
                subject.base_path,
                f"`{name}` adds nothing at any site: it was never trained, or training never "
                "reached it.",
                "Nothing, if it is new; else see that it was active and trainable in training.",
                is_note=True,
            )
            continue
        for place, size in found:
            if not size:
                yield Violation(
                    "dead adapters",
                    place.path,
                    f"`{name}` adds nothing here, while it does elsewhere.",
                    "See whether the forward runs this layer, and whether its tensors were "
                    "trainable.",
                    is_note=True,
                )


@check("oversized adapters")
@torch.no_grad()
def oversized_adapters(subject: Subject) -> Iterator[Violation]:
    """Changes that are larger than what they change, by the Frobenius norm."""
    for place, part in subject.parts:
        size, base = _delta_norm(part), _base_norm(place, part)
        if size is not None and base is not None and size > base > 0:
            yield Violation(
                "oversized adapters",
                place.path,
                f"the change that `{part.name}` makes is larger than the base's weight itself.",
                "Lower the learning rate, `lora_alpha` or the scaling, if that was not meant.",
                is_note=True,
            )


def _misplaced(
    part: Part, tensors: list[Tensor], base: list[nn.Parameter]
) -> Iterator[tuple[str, str]]:
    here = {t.device for t in tensors}
    there = {p.device for p in base}
    if any(d.type == "meta" for d in here) and not any(d.type == "meta" for d in there):
        yield (
            f"`{part.name}` is on the meta device and holds no values.",
            "Load its checkpoint, or add it without `low_cpu_mem_usage`.",
        )
    elif here and there and not here <= there:
        devices = [", ".join(sorted(map(str, each))) for each in (here, there)]
        yield (
            f"`{part.name}` is on {devices[0]}, its base layer on {devices[1]}.",
            "Move the whole model: model.to(device).",
        )


def _mistyped(place: Place, part: Part, tensors: list[Tensor]) -> Iterator[tuple[str, str]]:
    if part.method == "SAVED_MODULE" or "+" in part.method:
        return  # a copy has the dtypes of its module, and so has a bias beside an adapter
    base = storage_of(place.base).compute_dtype(place.base)
    kinds = {t.dtype for t in tensors}
    names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
    if len(kinds) > 1:
        yield (
            f"`{part.name}` holds tensors of several dtypes ({names}).",
            "Convert them to one: model.to(dtype), or load the adapter again.",
        )
    elif kinds and base is not None and kinds.isdisjoint({base, torch.float32, torch.float64}):
        yield (
            f"`{part.name}` is {names}, its base layer computes in "
            f"{str(base).removeprefix('torch.')}.",
            "Convert the adapter to the base's dtype or to float32.",
        )


@torch.no_grad()
def _delta_norm(part: Part) -> float | None:
    """Frobenius norm of ΔW; None where the adapter has no one ΔW, or holds no values."""
    if not part.tensors or not all(_has_values(t) for t in part.tensors.values()):
        return None
    if not part.grafts:
        found = [(part.tensors[a], part.tensors[b]) for a, b in _PAIRS if {a, b} <= {*part.tensors}]
        return _pair_norm(*found[0], part.scaling) if found else None
    graft = part.grafts[0]
    is_additive = graft.method.kind == "additive" and graft.site.geometry is not None
    if not (is_additive and graft.method.mergeable):
        return None
    params = graft.params
    pair = graft.method.low_rank(params)
    if pair is not None:
        return _pair_norm(*pair)
    dtype = next(iter(params.values())).dtype
    W = graft.site.weight().to(dtype) if graft.method.needs_weight else None
    return float(graft.method.delta(params, W).float().norm())


def _pair_norm(A: Tensor, B: Tensor, scale: float) -> float:
    """Of ``scale · B A``, by the two Gram matrices: ‖BA‖² = tr(BᵀB · AAᵀ)."""
    A, B = A.double().flatten(1), B.double().flatten(1)
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return abs(scale) * max(square, 0.0) ** 0.5


def _base_norm(place: Place, part: Part) -> float | None:
    """Of what the adapter changes, without what is merged into it."""
    if holder(place.base) is None or any(p.is_meta for p in place.base_parameters):
        return None
    if part.grafts:
        return float(part.grafts[0].site.weight().float().norm())
    return float(storage_of(place.base).read(place.base).float().norm())


def _has_values(tensor: Tensor) -> bool:
    """Whether there are numbers to look at: packed formats hold them in tensors of other types."""
    if type(tensor.detach()) is not Tensor:
        return False
    return tensor.is_floating_point() and not tensor.is_meta
