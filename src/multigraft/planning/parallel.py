"""Tensor parallelism on the meta device: one rank's part of every layer, and what it sends.

    column    W (out/n, in)    backwards, the ranks' dx are added up
    row       W (out, in/n)    forwards, the ranks' y are added up

by transformers' own plan for the model. Layers are divided before adapters are attached, so that
these lie as `multigraft.distributed.TensorParallel` cuts them. What is sent is counted where it
would be sent, in a step that is run: with gradient checkpointing more is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import ConfigError, UnsupportedError
from multigraft.layer import AdaptedLayer
from multigraft.planning.traffic import Traffic


@dataclass(frozen=True)
class Style:
    """How a layer lies on the ranks.

    Args:
        axis: of the weight, that is divided.
        size: the attribute that holds its length.
    """

    axis: int
    size: str
    copies_input: bool = False
    adds_output: bool = False
    gathers_output: bool = False


STYLES = {
    "colwise": Style(0, "out_features", copies_input=True),
    "rowwise": Style(1, "in_features", adds_output=True),
    "colwise_gather_output": Style(0, "out_features", copies_input=True, gathers_output=True),
    "embedding_rowwise": Style(0, "num_embeddings", adds_output=True),
}
"""Those of transformers that plans know."""


def divide(base: nn.Module, ranks: int) -> dict[str, Style]:
    """Give every layer of the model's plan one rank's part of its weight; the styles by path.

    Raises:
        UnsupportedError: the model has no plan, or one that asks for more than columns and rows.
        ConfigError: a layer's size is no multiple of the ranks.
    """
    plan = dict(getattr(base, "tp_plan", None) or {})
    if not plan:
        raise UnsupportedError(
            f"{type(base).__name__} has no `tp_plan`, so nobody says how its layers are divided. "
            "Use `fsdp`."
        )
    unknown = sorted(set(plan.values()) - set(STYLES))
    if unknown:
        raise UnsupportedError(
            f"{type(base).__name__}: its tensor-parallel plan asks for {', '.join(unknown)}, which "
            "cannot be planned yet. Use `fsdp`."
        )
    found = {}
    for path, layer in base.named_modules():
        name = plan.get(re.sub(r"\d+", "*", path))
        if name is not None:
            found[path] = STYLES[name]
            _divide(path, layer, STYLES[name], ranks)
    return found


def _divide(path: str, layer: Any, style: Style, ranks: int) -> None:
    size = getattr(layer, style.size)
    if size % ranks:
        raise ConfigError(f"`gpus` (={ranks}) must divide `{style.size}` (={size}) of {path}.")
    shape = list(layer.weight.shape)
    shape[style.axis] //= ranks
    setattr(layer, style.size, size // ranks)
    layer.weight = nn.Parameter(layer.weight.new_empty(shape), requires_grad=False)
    if layer._parameters.get("bias") is not None and style.axis == 0:
        layer.bias = nn.Parameter(layer.bias.new_empty(size // ranks), requires_grad=False)


class Meter:
    """Counts what divided layers send, from when it is made.

    Args:
        base: the adapted model, whose adapters see what their layers see.
        styles: of its layers, by path.
        ranks: how many have parts of them.
    """

    def __init__(self, base: nn.Module, styles: dict[str, Style], ranks: int) -> None:
        self.found = Traffic()
        self.ranks = ranks
        self.whole: list[Tensor] = []
        """Adapters' tensors that each rank has whole and a part of the gradient of."""
        for path, style in styles.items():
            layer = base.get_submodule(path)
            if isinstance(layer, AdaptedLayer):
                self.whole += _whole_factors(layer, style)
            if style.copies_input:
                layer.register_forward_pre_hook(self._copied)
            if style.adds_output:
                layer.register_forward_hook(self._summed)
            if style.gathers_output:
                layer.register_forward_hook(self._gathered)

    def of_step(self, parts: int) -> Traffic:
        """Of a step with so many parts, one of which was run since the last time."""
        found, self.found = self.found.times(parts), Traffic()
        return found + Traffic(all_reduce=sum(tensor.nbytes for tensor in self.whole))

    def add(self, **sizes: int) -> None:
        """So many bytes by a collective."""
        self.found = self.found + Traffic(**sizes)

    def _copied(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Copied.apply(args[0], self), *args[1:])

    def _summed(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.add(all_reduce=y.nbytes)

    def _gathered(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return _Gathered.apply(y, self)


def _whole_factors(layer: AdaptedLayer, style: Style) -> list[Tensor]:
    """A column's A and a row's B."""
    cut = "lora_B" if style.copies_input else "lora_A"
    return [
        tensor
        for graft in layer.all_grafts()
        for name, tensor in graft.params.items()
        if not name.startswith(cut) and tensor.requires_grad
    ]


class _Copied(torch.autograd.Function):
    """A column's input: what each rank finds for its gradient is a part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dx: Tensor) -> tuple[Tensor, None]:
        ctx.meter.add(all_reduce=dx[0].nbytes)
        return dx[0], None


class _Gathered(torch.autograd.Function):
    """A column's output, whole on every rank."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, meter: Meter) -> Tensor:
        ctx.width = y.shape[-1]
        meter.add(all_gather=y.nbytes * meter.ranks)
        return y.new_empty((*y.shape[:-1], y.shape[-1] * meter.ranks))

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        return dy[0][..., : ctx.width].contiguous(), None
