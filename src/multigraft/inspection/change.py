"""What an adapter changes at each site, as matrices: factors where there are such.

    ΔW = scale * b a        a: (pairs, rank, in)   b: (pairs, out, rank)

Without a base this is read from the files of low-rank pairs alone; with one, from any method that
changes weights, whose adapter is attached for that and taken off again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.bases import geometry_of
from multigraft.config import PeftConfig
from multigraft.effective import effective
from multigraft.errors import MultigraftError
from multigraft.graft import Graft
from multigraft.initialisations import START_A, START_B
from multigraft.inspection.files import AdapterFiles
from multigraft.methods import METHODS
from multigraft.site import Site
from multigraft.storage import storage_of

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""How the files call the factors of a pair, behind the path of its module."""
_BESIDE = (START_A, START_B)
"""What belongs to a pair in some files: where it began."""


@dataclass(frozen=True, eq=False)
class Change:
    """One adapter's change of one tensor of the base.

    Args:
        path: of the site.
        rank: of the update; 0 for methods without one.
        factors: ``a (pairs, rank, in)`` and ``b (pairs, out, rank)`` with the scale in ``b``; None
            for a change that is not of that form.
        dense: ``(pairs, out, in)``, where there are no factors.
        weight: the base's own, ``(pairs, out, in)``; None without a base.
    """

    path: str
    rank: int
    factors: tuple[Tensor, Tensor] | None
    dense: Tensor | None = None
    weight: Tensor | None = None

    def matrices(self) -> Tensor:
        """The change itself, ``(pairs, out, in)``."""
        if self.factors is None:
            assert self.dense is not None
            return self.dense
        a, b = self.factors
        return b @ a


@dataclass
class Left:
    """What has no figures here: paths, or kinds of tensors, to the reason."""

    reasons: dict[str, str] = field(default_factory=dict)


def changes_in_files(files: AdapterFiles, left: Left) -> Iterator[Change]:
    """The changes of an adapter of low-rank pairs, from its files alone.

    Args:
        left: is told what cannot be had that way, and why.
    """
    config = files.config
    if str(config.peft_type) != "LORA":
        left.reasons["the whole adapter"] = f"{config.peft_type}'s change needs the base's weights"
        return
    seen: set[str] = set()
    keys_at: dict[str, list[str]] = {}
    for key in files.tensors:
        for path in (key.rpartition(".")[0], key.rsplit(".", 2)[0]):  # names have one part or two
            keys_at.setdefault(path, []).append(key)
    for key in files.tensors:
        for a_name, b_name in _PAIRS:
            path = key.removesuffix(f".{a_name}")
            if path != key and f"{path}.{b_name}" in files.tensors:
                own = {k.removeprefix(f"{path}."): k for k in keys_at[path]}
                seen |= {own[name] for name in (a_name, b_name, *_BESIDE) if name in own}
                try:
                    yield _pair(path, config, {n: files.tensors[k] for n, k in own.items()})
                except MultigraftError as error:
                    left.reasons[path] = str(error)
    for key in files.tensors:
        if key not in seen:
            left.reasons[key] = "no part of a low-rank pair"


def changes_on(base: nn.Module, files: AdapterFiles, left: Left) -> Iterator[Change]:
    """The changes of an adapter of any method that changes weights, on its base.

    Raises:
        CheckpointError, TargetError: the files do not fit this base.
    """
    with _attached(base, files) as grafts:
        for graft in grafts:
            site = graft.site
            if graft.tied is not None or site.geometry is None or not _changes_weight(graft):
                left.reasons[str(site)] = f"{graft.method.name} has no matrix of its own here"
                continue
            geometry, layer = site.geometry, site.layer
            own = site.weight()
            W = geometry.as_matrices(layer, own).float()
            pair = graft.method.low_rank(graft.params) if _is_additive(graft) else None
            if pair is not None:
                yield Change(str(site), graft.method.rank, _scaled(geometry, layer, *pair), None, W)
                continue
            changed = effective(site.key, [graft], own.float())
            delta = geometry.as_matrices(layer, changed.float()) - W
            yield Change(str(site), graft.method.rank, None, delta, W)


@contextmanager
def _attached(base: nn.Module, files: AdapterFiles) -> Iterator[list[Graft]]:
    """The adapter's grafts, while it is on the base."""
    from multigraft.loading import load_into
    from multigraft.tuner import Tuner

    tuner = Tuner(base)
    name = "inspected"
    try:
        load_into(
            tuner,
            files.folder,
            name,
            autocast=False,
            config=files.config,
            allow_pickle=files.is_pickle,
        )
        yield [graft for _, graft in tuner.roster.grafts(name)]
    finally:
        tuner.unload()


def _is_additive(graft: Graft) -> bool:
    return graft.method.kind == "additive"


def _changes_weight(graft: Graft) -> bool:
    """Whether the tensor that the site names is a matrix that this graft changes."""
    if graft.method.kind == "replace":
        return "weight" in graft.owners
    return graft.method.name not in ("BIAS", "TOKEN_ADAPTER")


def _pair(path: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> Change:
    """The change of one pair, by the method's own reading of the config at a layer of its shape."""
    is_lookup = _PAIRS[1][0] in tensors
    A, B = (tensors[name].float() for name in _PAIRS[is_lookup])
    layer = _layer_of(A, B, is_lookup)
    config = config.copy()
    vars(config).update(lora_bias=False)  # a bias beside the pair is no part of ΔW
    site = Site(path, layer, geometry_of(layer), storage_of(layer))
    method: Any = METHODS["LORA"](site, config)
    specs = method.tensors()
    if tuple(specs[method.A].shape) != tuple(A.shape) or method.rank != A.shape[0]:
        raise MultigraftError(
            f"its factor A is {tuple(A.shape)}, which is not of rank {method.rank}; fused experts "
            "and other layers of many matrices need the base"
        )
    if not tensors.keys() >= {*method.starts().values()}:
        raise MultigraftError("it takes a part out of the base's weight, which the file lacks")
    held = {name: spec.on_disk or name for name, spec in specs.items()}
    params = {name: tensors[key].float() for name, key in held.items() if key in tensors}
    pair = method.low_rank(params) if params.keys() == specs.keys() else None
    if pair is None:
        raise MultigraftError("its change depends on the base's weight")
    return Change(path, method.rank, _scaled(site.geometry, layer, *pair))


def _layer_of(A: Tensor, B: Tensor, is_lookup: bool) -> nn.Module:
    """A layer that a pair of this shape could be at; it holds no values."""
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
        raise MultigraftError(f"factors of {tuple(A.shape)} and {tuple(B.shape)} are no pair")
    with torch.device("meta"):
        if is_lookup:
            return nn.Embedding(A.shape[1], B.shape[0])
        if A.dim() == 2:
            return nn.Linear(A.shape[1], B.shape[0], bias=False)
        kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        if A.dim() not in kinds:
            raise MultigraftError(f"factors of {A.dim()} dimensions are no pair")
        layer: nn.Module = kinds[A.dim()](A.shape[1], B.shape[0], tuple(A.shape[2:]), bias=False)
        return layer


def _scaled(geometry: Any, layer: nn.Module, A: Tensor, B: Tensor, scale: float) -> Any:
    a, b = geometry.pairs(layer, A.detach().float(), B.detach().float())
    return a, b * scale
