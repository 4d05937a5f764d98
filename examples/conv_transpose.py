"""A kind of layer of one's own in one file: transposed convolutions.

    ΔW[i, o, k...] = Σ_r B[o, r] A[r, i, k...]      A: (rank, in, k...)  B: (out, rank, 1...)

A is a transposed convolution with the base's own kernel, from its inputs to ``rank`` channels; B
mixes those at each place. The weight lies as ``(in, out, k...)``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from multigraft.bases import GEOMETRIES, Geometry

UP = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MIX = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvTranspose(Geometry):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``, without ``groups``."""

    name = "conv"  # methods that act on convolutions act on this kind as well

    def whole_refusal(self, layer):
        return None if layer.groups == 1 else f"its `groups` (={layer.groups}) are more than 1"

    def sizes(self, layer):
        return layer.in_channels, layer.out_channels

    def factor_shapes(self, layer, rank):
        kernel = layer.kernel_size
        return (rank, layer.in_channels, *kernel), (layer.out_channels, rank, *(1 for _ in kernel))

    def project(self, layer, x, A):
        return self.run(layer, x, A.transpose(0, 1))

    def lift(self, layer, h, B, bias=None):
        return MIX[len(layer.kernel_size)](h, B, bias)

    def run(self, layer, x, W):
        return UP[len(layer.kernel_size)](
            x, W, None, layer.stride, layer.padding, layer.output_padding, 1, layer.dilation
        )

    def product(self, layer, A, B):
        return torch.einsum("or,ri...->io...", B.flatten(1), A)

    def from_pairs(self, layer, a, b):
        ones = (1 for _ in layer.kernel_size)
        return a[0].unflatten(1, (-1, *layer.kernel_size)), b[0].unflatten(1, (-1, *ones))

    def as_matrix(self, layer, W):
        return W.transpose(0, 1).flatten(1)

    def from_matrix(self, layer, M):
        in_, out, *kernel = layer.weight.shape
        return M.reshape(out, in_, *kernel).transpose(0, 1)

    def fold_input(self, layer, W, map_):
        _, pull, *_ = torch.func.vjp(map_, torch.zeros_like(W.transpose(0, 1)))
        return pull(W.transpose(0, 1))[0].transpose(0, 1)

    def fold_output(self, layer, W, map_):
        return map_(W)

    def feature_axis(self, layer):
        return -1 - len(layer.kernel_size)


GEOMETRIES.register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)(ConvTranspose())
