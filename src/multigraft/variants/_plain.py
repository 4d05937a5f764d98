"""The plain pair, for variants that are one some of the time."""

from __future__ import annotations

from torch import Tensor

from multigraft.methods.contract import Method, Params

BIAS = "lora_B.bias"


def factors(lora: Method, params: Params) -> tuple[Tensor, Tensor]:
    """The pair of factors, less where they began if that is taken out of the base."""
    A, B = lora.pair(params)  # type: ignore[attr-defined]
    return A, B


def add_pair(lora: Method, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y + scale * B A x``, through the layer's own geometry."""
    dtype = lora.geometry.input_dtype(x, A)
    return lora.geometry.add_low_rank(lora.site.layer, y, x, A.to(dtype), B.to(dtype), scale)


def add_bias(lora: Method, params: Params, y: Tensor) -> Tensor:
    """``y`` plus B's bias, if the config gives it one."""
    if BIAS not in params:
        return y
    return y + lora.as_output_bias(params[BIAS] * lora.scaling).to(y.dtype)


def only_linear(lora: Method, what: str) -> str | None:
    """Why this variant of linear layers cannot act at the site, or ``None``."""
    if lora.geometry.name not in ("linear", "conv1d_transposed"):
        return (
            f"{what} is for linear layers, not for {lora.geometry.name}; leave this layer out of "
            "`target_modules`, or adapt it with another adapter"
        )
    if lora.site.rebinds:
        return (
            f"{what} changes how a layer runs, and here only a parameter is read; adapt it with "
            "a plain LoRA"
        )
    return None
