"""Convolutions: A is a convolution with the base's own kernel, B a 1x1 convolution.

    ΔW[o, i, k...] = Σ_r B[o, r] A[r, i, k...]      A: (rank, in, k...)  B: (out, rank/groups, 1...)

With ``groups`` g the base sees ``in/g`` channels per group. PEFT's layout is kept: A is dense over
all input channels, B is grouped. Such an update reaches weights that a grouped kernel does not
have, so it runs but cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft.bases.contract import GEOMETRIES, Geometry
from multigraft.errors import UnsupportedError

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(Geometry):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: weight ``(out, in/groups, k...)``."""

    name = "conv"

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        return int(layer.in_channels), int(layer.out_channels)  # type: ignore[arg-type]

    def factor_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = cast(Any, layer)
        in_, out = self.sizes(layer)
        ones = (1,) * len(conv.kernel_size)
        return (rank, in_, *conv.kernel_size), (out, rank // conv.groups, *ones)

    def check_rank(self, layer: nn.Module, rank: int) -> str | None:
        groups = cast(Any, layer).groups
        if rank % groups:
            return f"`rank` (={rank}) must be a multiple of the convolution's `groups` (={groups})"
        return None

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return _convolve(cast(Any, layer), x, A, groups=1)

    def run(self, layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
        conv = cast(Any, layer)
        return _convolve(conv, x, W, groups=conv.groups)

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        conv = cast(Any, layer)
        return _CONV[len(conv.kernel_size)](h, B, bias, groups=conv.groups)

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        groups = cast(Any, layer).groups
        if groups > 1:
            raise UnsupportedError(
                f"a low-rank update of a convolution with `groups` (={groups}) > 1 reaches weights "
                "that the grouped kernel does not have: it cannot be merged; keep it as an adapter"
            )
        return torch.einsum("or,ri...->oi...", B.flatten(1), A)

    def pairs(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        groups = cast(Any, layer).groups
        return A.flatten(1).unflatten(0, (groups, -1)), B.flatten(1).unflatten(0, (groups, -1))

    def from_pairs(self, layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kernel = cast(Any, layer).kernel_size
        ones = (1,) * len(kernel)
        return a.flatten(0, 1).unflatten(1, (-1, *kernel)), b.flatten(0, 1).unflatten(
            1, (-1, *ones)
        )

    def as_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        return W.flatten(1)

    def from_matrix(self, layer: nn.Module, M: Tensor) -> Tensor:
        shape = cast(Any, layer).weight.shape
        return M.reshape(shape)

    def fold_input(self, layer: nn.Module, W: Tensor, map_: Callable[[Tensor], Tensor]) -> Tensor:
        """For maps that act on channels alike everywhere: a kernel is then an input of its own."""
        groups = cast(Any, layer).groups
        blocks = W.unflatten(0, (groups, -1))
        wide = torch.stack([_in_channels(b, g, groups) for g, b in enumerate(blocks)])
        _, pull, *_ = torch.func.vjp(map_, torch.zeros_like(wide.flatten(0, 1)))
        (wide,) = pull(wide.flatten(0, 1))
        parts = wide.unflatten(0, (groups, -1)).unbind()
        size = W.shape[1]
        return torch.cat([p[:, g * size : (g + 1) * size] for g, p in enumerate(parts)])

    def fold_output(self, layer: nn.Module, W: Tensor, map_: Callable[[Tensor], Tensor]) -> Tensor:
        return map_(W.transpose(0, 1)).transpose(0, 1)

    def feature_axis(self, layer: nn.Module) -> int:
        return -1 - len(cast(Any, layer).kernel_size)


def _in_channels(block: Tensor, group: int, groups: int) -> Tensor:
    """A group's kernels ``(out/groups, in/groups, k...)`` over all input channels, zero else."""
    wide = block.new_zeros((block.shape[0], block.shape[1] * groups, *block.shape[2:]))
    wide[:, group * block.shape[1] : (group + 1) * block.shape[1]] = block
    return wide


def _convolve(conv: Any, x: Tensor, W: Tensor, groups: int) -> Tensor:
    """``x`` with kernel ``W`` under the layer's own stride, padding and dilation."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return _CONV[len(conv.kernel_size)](
        x, W, stride=conv.stride, padding=padding, dilation=conv.dilation, groups=groups
    )


GEOMETRIES.register(nn.Conv1d, nn.Conv2d, nn.Conv3d)(Conv())
