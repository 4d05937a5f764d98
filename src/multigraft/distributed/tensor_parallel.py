"""Tensor parallelism: low-rank pairs cut the way their layer is, so that they send nothing more.

    column    W (out/n, in)    A (rank, in)      B (out/n, rank)    y_n = W_n x + s B_n A x
    row       W (out, in/n)    A (rank, in/n)    B (out, rank)      y = Σ_n W_n x_n + s B A_n x_n

Forwards, a column's pair is local, and a row's goes into the very sum that its layer needs.
Backwards, a column's dx goes into its layer's sum likewise. What is left is the gradient of the
factor that every rank has whole: each has a part of it, and `TensorParallel.reduce` adds them up,
all layers' at once, once a step.

Layers are those of transformers' ``tp_plan`` and of `torch.distributed.tensor.parallel`. Factors
become `DTensor` parameters: saving, merging, optimisers and sharded checkpoints see whole ones.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce, wait_tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from multigraft import kernels
from multigraft.bank import Bank, Pair, joined, pair, rate
from multigraft.containers import fetch, hold
from multigraft.distributed.replicas import Replicas, buckets, flattened, unflatten
from multigraft.errors import UnsupportedError
from multigraft.fused import dropped
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.state import roster_of_model

COLUMN, ROW = (Shard(0),), (Shard(1),)


@dataclass(frozen=True)
class Cut:
    """How a linear layer lies on the ranks.

    Args:
        is_column: by its output's features, or else by its input's.
        is_whole_outside: a column gives its whole output, a row takes its whole input.
    """

    mesh: Any
    is_column: bool
    is_whole_outside: bool

    @property
    def group(self) -> Any:
        """The ranks that hold its parts."""
        return self.mesh.get_group()


class TensorParallel:
    """A model whose layers, and their adapters, lie in parts on the ranks of a mesh.

    Args:
        model: a `PeftModel` on a base that is tensor-parallel already.
        rows: the ranks that hold the same parts and see other rows, where there are any.

    Raises:
        StateError: the model has no adapters.
        UnsupportedError: an adapter acts on a parted layer with more than low-rank pairs.
    """

    def __init__(self, model: nn.Module, rows: dist.ProcessGroup | None = None) -> None:
        self.roster, _ = roster_of_model(model)
        self.model = model
        self.rows = rows
        self.cuts: dict[AdaptedLayer, Cut] = {}
        self.group: Any = None
        self.spread()

    def spread(self) -> None:
        """Cut the adapters that are whole yet: all of them at first, later those that were added.

        They get the values of the mesh's first rank.
        """
        layers = self.roster.touched(self.roster.configs)
        styles = _styles(self.roster.root)
        cuts = {x: cut for x in layers if (cut := cut_of(x, styles)) is not None}
        for layer in cuts:
            for graft in layer.all_grafts():
                _refuse_more_than_pairs(layer, graft)
        if cuts:
            self.group = next(iter(cuts.values())).group
            Replicas(self.model, self.group)
        for layer, cut in cuts.items():
            for graft in layer.all_grafts():
                _spread(graft, cut)
            layer.forward = Parallel(layer, cut)  # type: ignore[method-assign]
        self.cuts = cuts

    @torch.no_grad()
    def reduce(self) -> None:
        """Add up what each rank has of the gradients of factors that all have whole."""
        partial = []
        for parameter in self.parameters():
            grad: Any = parameter.grad
            if grad is not None and any(isinstance(p, Partial) for p in grad.placements):
                partial.append((parameter, grad.to_local()))
        if partial:
            _sum([own for _, own in partial], self.group)
        for parameter, own in partial:
            spec: Any = parameter
            parameter.grad = DTensor.from_local(
                own, spec.device_mesh, spec.placements, run_check=False
            )
        if self.rows is not None:
            size = dist.get_world_size(self.rows)
            grads = [p.grad for p in self.model.parameters() if p.requires_grad]
            local = [g.to_local() if isinstance(g, DTensor) else g for g in grads if g is not None]
            _sum(local, self.rows, 1.0 / size)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors that lie on the mesh."""
        for layer in self.cuts:
            for graft in layer.all_grafts():
                yield from (p for p in graft.parameters() if isinstance(p, DTensor))


class Parallel:
    """What an adapted layer runs in place of its own forward.

    Args:
        layer: it.
        cut: how its base layer lies on the ranks.
    """

    def __init__(self, layer: AdaptedLayer, cut: Cut) -> None:
        self.layer = layer
        self.cut = cut

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, as its own call would give it."""
        layer, route = self.layer, self.layer.roster.route
        (x,) = (*args, *kwargs.values())
        if route is None and not layer.plan.deltas:
            return layer.base_layer(x)
        if isinstance(x, DTensor):
            x = x.full_tensor() if self._takes_whole else x.to_local()
        x = self._received(x)
        if route is None:
            return self._given(self._whole(layer.plan.deltas, x))
        x = route.spread(x)
        rows = [name for name, _ in route.groups(x, layer) if layer.grafts_of(name)]
        own = {name: self._local(self._joined(name)) for name in rows}
        y = F.linear(x, *self._frozen())
        if own:
            bank = Bank([list(own.values())], x.dtype)
            y = bank.add(y, x, route.grouping(x, tuple(own)))
        return self._given(y)

    @property
    def _takes_whole(self) -> bool:
        return self.cut.is_column or self.cut.is_whole_outside

    def _whole(self, grafts: Sequence[Graft], x: Tensor) -> Tensor:
        """This rank's part of the output, with these adapters in it."""
        training = self.layer.training
        W, bias = self._frozen()
        one = pair(grafts[0], training, dropout=True) if len(grafts) == 1 else None
        found = one or joined(grafts, training)
        if (
            found is not None
            and W.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        ):
            A, B, scale = self._local(found)
            part = kernels.Part(W, bias, (A,), (B,), (scale,))
            p = rate(grafts, training)
            return kernels.adapted_linears(x, [part], dropped(x, p, [part]) if p else None)[0]
        y = F.linear(x, W, bias)
        for graft in grafts:
            own = pair(graft, training, dropout=True)
            assert own is not None, "checked when it was cut"
            seen = F.dropout(x, graft.method.dropout, training)
            y = kernels.low_rank_add(y, seen, *self._local(own))
        return y

    def _joined(self, names: tuple[str, ...]) -> Pair:
        """One pair for the adapters of some rows."""
        found = joined(self.layer.grafts_of(names), self.layer.training)
        if found is None:
            raise UnsupportedError(
                f"{self.layer.path}: {', '.join(f'`{n}`' for n in names)} have dropout, which rows "
                "of one batch cannot have of their own under tensor parallelism. Set "
                "`lora_dropout` to 0, or train each adapter in batches of its own (set_adapter)."
            )
        return found

    def _frozen(self) -> tuple[Tensor, Tensor | None]:
        """This rank's part of the weight, and of the bias where that can be added before a sum."""
        held = self.layer.base_layer._parameters
        weight, bias = held["weight"], held.get("bias")
        own: Any = bias.detach() if bias is not None and self.cut.is_column else None
        return _part(weight), None if own is None else _part(own)

    def _local(self, found: Pair) -> Pair:
        A, B, scale = found
        return self._factor(A), self._factor(B), scale

    def _factor(self, factor: Any) -> Tensor:
        """This rank's part; of a whole one each rank gets a part of the gradient."""
        is_whole = factor.placements == (Replicate(),)
        own: Tensor = factor.to_local(grad_placements=[Partial()] if is_whole else None)
        return own

    def _received(self, x: Tensor) -> Tensor:
        if self.cut.is_column:
            return _Copied.apply(x, self.cut.group)
        return _Split.apply(x, self.cut.group) if self.cut.is_whole_outside else x

    def _given(self, y: Tensor) -> Tensor:
        if self.cut.is_column:
            return _Gathered.apply(y, self.cut.group) if self.cut.is_whole_outside else y
        y = _Summed.apply(y, self.cut.group)
        bias = self.layer.base_layer._parameters.get("bias")
        return y if bias is None else y + _part(bias)


def cut_of(layer: AdaptedLayer, styles: dict[str, Any]) -> Cut | None:
    """How an adapted layer's base lies on the ranks, or None when each has all of it.

    Raises:
        UnsupportedError: it lies in a way that adapters cannot follow.
    """
    base = layer.base_layer
    weight: Any = base._parameters.get("weight")
    if not isinstance(weight, DTensor):
        return None
    outside = _outside(layer, base, styles)
    if outside is None or weight.placements not in (COLUMN, ROW) or not isinstance(base, nn.Linear):
        raise UnsupportedError(
            f"{layer.path}: its weight lies on the ranks as {weight.placements}, and adapters can "
            "follow linear layers that are column- or row-parallel, by transformers' tp_plan (from "
            "5.21 on) or parallelize_module(). Leave it out with `exclude_modules`; for FSDP2 see "
            "multigraft.distributed.shard."
        )
    is_column = weight.placements == COLUMN
    taken, given = outside
    is_whole = given == Replicate() if is_column else taken == Replicate()
    expected = (Replicate(), given) if is_column else (taken, Replicate())
    if (taken, given) != expected:
        raise UnsupportedError(
            f"{layer.path} takes {taken} and gives {given} (sequence parallelism), which adapters "
            "cannot follow yet. Leave it out with `exclude_modules`."
        )
    return Cut(weight.device_mesh, is_column, is_whole)


def _outside(layer: AdaptedLayer, base: nn.Module, styles: dict[str, Any]) -> Any:
    """What the layer takes and gives: layouts of its input and output."""
    pattern = re.sub(r"\d+", "*", layer.path)
    style = styles.get(layer.path) or styles.get(pattern)
    if style is not None and "forward" in base.__dict__:
        return style.input_layouts, style.output_layouts
    found = {}
    for hook in (*base._forward_pre_hooks.values(), *base._forward_hooks.values()):
        for cell in getattr(hook, "__closure__", None) or ():
            if isinstance(cell.cell_contents, functools.partial):
                found[cell.cell_contents.func.__name__] = cell.cell_contents.args[0]
    names = ("_prepare_input_fn", "_prepare_output_fn")
    if not found.keys() >= set(names):
        return None
    return tuple(found[n][0] if isinstance(found[n], tuple) else found[n] for n in names)


def _styles(root: nn.Module) -> dict[str, Any]:
    """Transformers' styles by the paths that its plan gives them."""
    plan = getattr(root, "tp_plan", None)
    if not plan:
        return {}
    try:
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    except ImportError:  # an older one, whose layers are of other kinds
        return {}
    styles = {path: ALL_PARALLEL_STYLES[name] for path, name in plan.items()}
    return {path: s for path, s in styles.items() if hasattr(s, "input_layouts")}


def _refuse_more_than_pairs(layer: AdaptedLayer, graft: Graft) -> None:
    method = graft.method
    is_pair = method.kind == "additive" and not graft.tied and not graft.shared
    if not is_pair or any(pair(graft, mode, dropout=True) is None for mode in (True, False)):
        raise UnsupportedError(
            f"{layer.path}: adapter `{graft.adapter}` ({method.name}) is more than a low-rank pair "
            "there, and tensor parallelism cuts pairs alone. Use plain LoRA, or FSDP2 "
            "(multigraft.distributed.shard), which takes every method."
        )


def _spread(graft: Graft, cut: Cut) -> None:
    """Let a graft's factors lie on the ranks as its layer does."""
    for name, owner in graft.owners.items():
        tensor = fetch(*owner)
        if isinstance(tensor, DTensor):
            continue
        is_cut = name.partition(".")[0].endswith("_B" if cut.is_column else "_A")
        where: Any = (COLUMN if cut.is_column else ROW) if is_cut else (Replicate(),)
        value = distribute_tensor(tensor.detach(), cut.mesh, where, src_data_rank=None)
        is_parameter = isinstance(tensor, nn.Parameter)
        hold(*owner, nn.Parameter(value, tensor.requires_grad) if is_parameter else value)


def _part(tensor: Any) -> Tensor:
    own: Tensor = tensor.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def _sum(tensors: list[Tensor], group: Any, scale: float = 1.0) -> None:
    """Make each tensor the sum of the ranks' own, in place and in large buckets."""
    for bucket in buckets(tensors):
        flat = flattened(bucket)
        dist.all_reduce(flat, group=group)
        unflatten(flat.mul_(scale) if scale != 1.0 else flat, bucket)


class _Copied(torch.autograd.Function):
    """The input of a column: what each rank finds for its gradient is a part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return wait_tensor(all_reduce(dx.contiguous(), "sum", ctx.group)), None


class _Summed(torch.autograd.Function):
    """The output of a row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        return wait_tensor(all_reduce(y.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Gathered(torch.autograd.Function):
    """The output of a column that gives all of it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return wait_tensor(all_gather_tensor(y.contiguous(), y.dim() - 1, group))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _own_share(dy, ctx.group), None


class _Split(torch.autograd.Function):
    """The input of a row that takes all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _own_share(x, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return wait_tensor(all_gather_tensor(dx.contiguous(), dx.dim() - 1, ctx.group)), None


def _own_share(tensor: Tensor, group: Any) -> Tensor:
    return tensor.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)]
