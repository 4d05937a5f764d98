"""Megatron's tensor-parallel linear layers: each rank holds a shard of W, and of one factor.

    column: W (out/n, in)    A (r, in) on every rank    B (out/n, r) a shard
    row:    W (out, in/n)    A (r, in/n) a shard        B (out, r) on every rank

The narrow product is what is gathered or summed between ranks, never one as wide as the layer's
output. Their forwards give ``(output, bias)`` and take ``(sequence, batch, in)``, or a shard of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from multigraft.bases.contract import GEOMETRIES, Geometry
from multigraft.errors import ConfigError, MissingExtraError

Region = Callable[[Tensor], Tensor]


class Sharded(Geometry):
    """What column- and row-parallel layers have in common."""

    takes_rows = False  # the batch is the second axis
    plain_only = True

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        """``(in, out)`` of this rank's shard."""
        out, in_ = cast(Tensor, layer.weight).shape
        return in_, out

    def understands(self, layer: nn.Module) -> bool:
        return isinstance(layer._parameters.get("weight"), nn.Parameter)

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return B @ A

    def matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        return B, A


class ColumnParallel(Sharded):
    """``ColumnParallelLinear``: the output's features are spread over the ranks."""

    name = "megatron_column"

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        if _is_sequence_parallel(layer):
            h = _region(layer, "gather_from_sequence_parallel_region")(h)
        else:
            h = _region(layer, "copy_to_tensor_model_parallel_region")(h)
        y = F.linear(h, B, bias)
        if cast(Any, layer).gather_output:
            y = _region(layer, "gather_from_tensor_model_parallel_region")(y)
        return y


class RowParallel(Sharded):
    """``RowParallelLinear``: the input's features are spread over the ranks, and outputs summed."""

    name = "megatron_row"

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        if not cast(Any, layer).input_is_parallel:
            x = _region(layer, "scatter_to_tensor_model_parallel_region")(x)
        h = F.linear(x, A)
        if _is_sequence_parallel(layer):
            return _region(layer, "reduce_scatter_to_sequence_parallel_region")(h)
        return _region(layer, "reduce_from_tensor_model_parallel_region")(h)

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(h, B, bias)


def serve_megatron(core: str | None) -> None:
    """Serve the layers of this core module too: a modified `megatron.core` of one's own.

    Raises:
        ConfigError: the name does not begin with ``megatron.``: a config may come from anywhere,
            and what it names is imported.
        MissingExtraError: there is no such module.
    """
    if not isinstance(core, str) or not core.startswith("megatron."):
        raise ConfigError(
            f"LoraConfig: `megatron_core` (={core!r}) must name a module of the package "
            '`megatron`, such as "megatron.core": what it names is imported.'
        )
    try:
        parallel = importlib.import_module(core).tensor_parallel
    except ImportError as error:
        raise MissingExtraError(
            f"`megatron_core` (={core!r}) cannot be imported ({error}). Install Megatron-Core."
        ) from error
    for cls, geometry in (
        (parallel.ColumnParallelLinear, COLUMN),
        (parallel.RowParallelLinear, ROW),
    ):
        if GEOMETRIES.find(cls) is None:
            GEOMETRIES.register(cls)(geometry)


def _is_sequence_parallel(layer: nn.Module) -> bool:
    return bool(getattr(layer, "sequence_parallel", False))


def _region(layer: nn.Module, name: str) -> Region:
    """What moves a tensor between ranks, from the package that the layer comes from."""
    for cls in type(layer).__mro__:
        package, _, _ = cls.__module__.rpartition(".tensor_parallel")
        found = sys.modules.get(f"{package}.tensor_parallel")
        if package and hasattr(found, name):
            return cast(Region, getattr(found, name))
    raise MissingExtraError(f"{type(layer).__name__}: its package has no `{name}`.")


COLUMN, ROW = ColumnParallel(), RowParallel()
GEOMETRIES.register("megatron.core.tensor_parallel.layers.ColumnParallelLinear")(COLUMN)
GEOMETRIES.register("megatron.core.tensor_parallel.layers.RowParallelLinear")(ROW)
