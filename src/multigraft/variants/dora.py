"""Weight-decomposed low-rank adaptation (DoRA).

    W' = m * (W + s B A) / ‖W + s B A‖        m: (out,)   norm over each output feature's weights

The norm is taken from the factors, never from the dense product:

    ‖W + s B A‖² = ‖W‖² + 2 s rowsum((W Aᵀ) ∘ B) + s² rowsum((B A Aᵀ) ∘ B)

and kept until A, B or W change: once per step of the optimiser. ‖W‖² outlives A's and B's changes.
Frozen linear layers of one input run with their adapters as one node,
`multigraft.kernels.reweighted_linears`.
Stacked experts have a magnitude for each expert's output features, (experts, out).

Paper: Liu et al. 2024, arXiv:2402.09353, eq. 5; the norm is held constant in the gradient (4.3).
Departs: with dropout in training, the base product is taken of the dropped input too, as PEFT does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multigraft import kernels
from multigraft.draws import dropout
from multigraft.kernels import AnyPart
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants._memo import Memo
from multigraft.variants._runtime import borrowed
from multigraft.variants.contract import Variant, variant

MAGNITUDE = "lora_magnitude_vector.weight"
BLOCK = 2**22
"""Elements of the weight that are widened at a time."""


@variant("dora")
class DoRA(Variant):
    """Direction by LoRA, magnitude by a vector of its own."""

    needs_weight = True
    needs_base = True
    combines = True
    takes_starts = True
    has_exact_gradients = False  # the norm is a constant to them, section 4.3 of the paper

    @classmethod
    def selected(cls, config: Any) -> bool:
        return bool(config.use_dora)

    def refusal(self, lora: Method) -> str | None:
        if lora.config.lora_bias:
            return "`use_dora` cannot be combined with `lora_bias`; leave one of them out"
        groups = getattr(lora.site.layer, "groups", 1)
        return (
            f"`use_dora` needs a convolution with `groups` 1, not {groups}" if groups > 1 else None
        )

    def memory(self) -> Norms:
        return Norms()

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        _, out = lora.geometry.sizes(lora.site.layer)
        spatial = -1 - lora.geometry.feature_axis(lora.site.layer)
        shape = (1, out, *(1,) * spatial) if spatial else (out,)
        count = lora.geometry.count(lora.site.layer)
        shape = shape if count is None else (count, out)
        return {MAGNITUDE: TensorSpec(shape, on_disk="lora_magnitude_vector")}

    def reset(self, lora: Method, params: Params) -> None:
        m = params[MAGNITUDE]
        if m.is_meta:
            return
        device = borrowed(lora.config, m.device)
        norm = _norm(lora, params) if device is None else _norm_on(device, lora, params)
        m.copy_(norm.reshape(m.shape))

    def part(
        self, lora: Method, params: Params, W: Tensor, bias: Tensor | None, training: bool
    ) -> AnyPart | None:
        if lora.dropout and training:
            return None  # the base's own part of the output sees what is not dropped
        A, B = _factors(lora, params)
        m = params[MAGNITUDE].flatten()
        return kernels.Reweighted(W, bias, A, B, lora.scaling, m, Norm(lora, params))

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        assert base is not None
        g = lora.as_output_bias(params[MAGNITUDE].flatten() / _norm(lora, params)[0])
        layer = lora.site.layer
        if lora.dropout and training:
            x = dropout(x, lora.dropout)
            base = lora.geometry.run(layer, x, lora.site.weight().to(x.dtype))
        else:
            bias = getattr(layer, "bias", None)
            base = base if bias is None else base - lora.as_output_bias(bias).to(base.dtype)
        update = (g - 1) * base + g * lora.apply_factors(params, x)  # type: ignore[attr-defined]
        return y + update.to(y.dtype)

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        assert W is not None
        layer, geometry = lora.site.layer, lora.geometry
        A, B = _factors(lora, params)
        M = geometry.as_matrices(layer, geometry.add_product(layer, W, A, B, lora.scaling))
        m = params[MAGNITUDE].view(*M.shape[:2], 1)
        g = m / M.detach().norm(dim=2, keepdim=True)
        return geometry.from_matrices(layer, g * M) - W

    def add_delta(self, lora: Method, params: Params, value: Tensor, W: Tensor | None) -> Tensor:
        assert W is not None
        is_alone = lora.site.rebinds and value.data_ptr() == W.data_ptr()
        if not is_alone or value.dtype != W.dtype or not value.is_contiguous():
            return super().add_delta(lora, params, value, W)
        # Nobody else changes what another forward is about to read: W' itself, and no ΔW.
        layer, geometry = lora.site.layer, lora.geometry
        A, B = (f.to(W.dtype) for f in geometry.pairs(layer, *_factors(lora, params)))
        stack = geometry.as_matrices(layer, W)
        m = params[MAGNITUDE].view(*stack.shape[:2]).to(W.dtype)
        whole = kernels.reweighted_matrices(stack, A, B, lora.scaling, m)
        return geometry.from_matrices(layer, whole)


class Norms:
    """What is kept at a site: ‖W + s B A‖, and the part of it that is the base's alone."""

    def __init__(self) -> None:
        self.whole = Memo()
        self.own = Memo()


class Norm:
    """‖W + s B A‖ at a site, as `kernels.Reweighted` asks for it."""

    def __init__(self, lora: Method, params: Params) -> None:
        self.lora, self.params = lora, params
        self.norms: Norms = lora.memory  # type: ignore[attr-defined]
        site = lora.site.tied or lora.site
        stored = [_stored(site.layer, site.tensor_name)]
        trained = [tensor for name, tensor in params.items() if name != MAGNITUDE]
        self.state = trained, stored, lora.scaling

    def kept(self) -> Tensor | None:
        """The norm, if it is known, ``(out,)``."""
        found = self.norms.whole.kept(*self.state)
        return None if found is None else found[0]

    def __call__(self, product: Tensor | None = None) -> Tensor:
        """The norm ``(out,)``; ``product`` is A Wᵀ, where it is at hand."""
        trained, stored, _ = self.state
        if product is not None and all(tensor.dtype == product.dtype for tensor in trained):
            own = self.norms.own.kept(frozen=stored)
            if own is not None:
                new = _adapted_norm(self.lora, self.params, None, own, product)
                self.norms.whole.keep(new, *self.state)
                return new[0]
        return self.of_each()[0]

    def of_each(self) -> Tensor:
        """Of each matrix's output features, ``(n, out)``, in at least float32."""
        return self.norms.whole.get(self._computed, *self.state)

    def _computed(self) -> Tensor:
        W = self.lora.site.weight()
        if kernels.is_autocasting(W):
            with kernels.without_autocast(W):
                return self._whole(W)
        return self._whole(W)

    def _whole(self, W: Tensor) -> Tensor:
        own = self.norms.own.get(lambda: _square(self.lora, W), frozen=self.state[1])
        return _adapted_norm(self.lora, self.params, W, own)


def _norm(lora: Method, params: Params) -> Tensor:
    """‖W + s B A‖ of each matrix's output features, ``(n, out)``, in at least float32."""
    return Norm(lora, params).of_each()


def _norm_on(device: torch.device, lora: Method, params: Params) -> Tensor:
    """The same, computed on another device, of which nothing is kept there."""
    W = lora.site.weight().to(device)
    there = {name: tensor.to(device) for name, tensor in params.items()}
    return _adapted_norm(lora, there, W, _square(lora, W))


def _stored(layer: nn.Module, name: str) -> Tensor | None:
    """The tensor that a weight is held in, whatever its format; None where it is computed."""
    return layer._parameters.get(name, layer._buffers.get(name))


def _square(lora: Method, W: Tensor) -> Tensor:
    """‖W‖² of each row, ``(n, out)``, without a wider copy of W."""
    M = lora.geometry.as_matrices(lora.site.layer, W)
    wide = torch.promote_types(W.dtype, torch.float32)
    return torch.linalg.vector_norm(M, dim=2, dtype=wide).square()


@torch.no_grad()
def _adapted_norm(
    lora: Method, params: Params, W: Tensor | None, own: Tensor, product: Tensor | None = None
) -> Tensor:
    """The norm of the factors and either W or A Wᵀ, which then is in A's dtype."""
    A, B = _factors(lora, params)
    if product is not None:
        return _row_norms(product, A, B, own[0], lora.scaling)[None]
    assert W is not None
    layer, geometry = lora.site.layer, lora.geometry
    dtype = torch.promote_types(torch.promote_types(A.dtype, W.dtype), torch.float32)
    A, B, s = A.to(dtype), B.to(dtype), lora.scaling
    if geometry.count(layer) is None:
        M = geometry.as_matrix(layer, W)
        A, B = A.flatten(1), B.flatten(1)
        return _row_norms(_product(M, A), A, B, own[0], s)[None]
    each = zip(geometry.as_matrices(layer, W), *geometry.pairs(layer, A, B), own, strict=True)
    return torch.stack([_row_norms(_product(M, a), a, b, n, s) for M, a, b, n in each])


def _row_norms(product: Tensor, A: Tensor, B: Tensor, own: Tensor, s: float) -> Tensor:
    """‖M + s B A‖ of each row, ``(out,)``: own + colsum((2 s A Mᵀ + s² A Aᵀ Bᵀ) ∘ Bᵀ), rooted.

    Args:
        product: A Mᵀ.
    """
    change = torch.addmm(product, A @ A.T, B.T, beta=2 * s, alpha=s * s).mul_(B.T)
    return change.sum(0).add_(own).clamp_min_(0).sqrt_()


def _product(M: Tensor, a: Tensor) -> Tensor:
    """``a Mᵀ`` in ``a``'s dtype, in blocks where M has another: a wide copy of it is never held."""
    if M.dtype == a.dtype:
        return a @ M.T
    rows = max(1, BLOCK // M.shape[1])
    return torch.cat([a @ block.to(a.dtype).T for block in M.split(rows)], dim=1)


def _factors(lora: Method, params: Params) -> tuple[Tensor, Tensor]:
    A, B = lora.factors(params)  # type: ignore[attr-defined]
    return A, B
