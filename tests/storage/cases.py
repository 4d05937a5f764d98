"""Every storage that tests run over: a name, and how to make a layer of it from an `nn.Linear`.

    for name, case in CASES.items():
        layer = case.build(nn.Linear(64, 64))      # the linear is left as it was

Sizes must be multiples of 32. `case.dtype` is what the layer's input takes; `case.error` bounds
``‖read(write(W)) - W‖ / ‖W‖`` for normal values; `case.merges` says whether it can be written.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One storage.

    Args:
        build: makes a layer of this storage from a linear layer, which it leaves alone.
        error: bound of the relative rounding error of one write.
        dtype: dtype of inputs.
        merges: whether `refusal` is None.
    """

    build: Callable[[nn.Linear], nn.Module]
    error: float
    dtype: torch.dtype = torch.float32
    merges: bool = True


def dense(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: copy.deepcopy(linear).to(dtype)


def float8(linear: nn.Linear) -> nn.Module:
    """Stored in 8 bits, cast for the length of a forward, as layer-wise casting does it."""
    layer = copy.deepcopy(linear)
    stored, bits = torch.float8_e4m3fn, nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn))
    layer.weight = bits

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        module._parameters["weight"] = nn.Parameter(bits.to(args[0].dtype), requires_grad=False)

    def narrow(module: nn.Module, args: object, output: object) -> None:
        module._parameters["weight"] = bits
        assert bits.dtype == stored

    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(narrow)
    return layer


def bnb4(quant_type: str, double: bool) -> Callable[[nn.Linear], nn.Module]:
    def build(linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            compress_statistics=double,
            quant_type=quant_type,
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")  # quantises

    return build


def bnb8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    has_bias = linear.bias is not None
    layer = Linear8bitLt(
        linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def torchao(config: str, dtype: torch.dtype = torch.float32) -> Callable[[nn.Linear], nn.Module]:
    def build(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        holder = nn.Sequential(copy.deepcopy(linear).to(dtype))
        quantization.quantize_(holder, getattr(quantization, config)())
        return holder[0]

    return build


def parametrised(name: str) -> Callable[[nn.Linear], nn.Module]:
    def build(linear: nn.Linear) -> nn.Module:
        from torch.nn.utils import parametrizations

        return getattr(parametrizations, name)(copy.deepcopy(linear))

    return build


def hooked(name: str) -> Callable[[nn.Linear], nn.Module]:
    def build(linear: nn.Linear) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(torch.nn.utils, name)(copy.deepcopy(linear))

    return build


CASES: dict[str, Case] = {
    "float32": Case(dense(torch.float32), 0.0),
    "bfloat16": Case(dense(torch.bfloat16), 2**-8, torch.bfloat16),
    "float16": Case(dense(torch.float16), 2**-11, torch.float16),
    "float8": Case(float8, 2**-4),
    "bnb-nf4": Case(bnb4("nf4", False), 0.11),
    "bnb-nf4-double": Case(bnb4("nf4", True), 0.11),
    "bnb-fp4": Case(bnb4("fp4", False), 0.16),
    "bnb-fp4-double": Case(bnb4("fp4", True), 0.16),
    "bnb-int8": Case(bnb8, 0.01),
    "torchao-int8": Case(torchao("Int8WeightOnlyConfig"), 0.01),
    "torchao-int8-bf16": Case(
        torchao("Int8WeightOnlyConfig", torch.bfloat16), 0.01, torch.bfloat16
    ),
    "torchao-float8": Case(torchao("Float8WeightOnlyConfig"), 0.04),
    "torchao-intx": Case(torchao("IntxWeightOnlyConfig"), 0.01),
    "weight-norm": Case(parametrised("weight_norm"), 1e-6),
    "weight-norm-hook": Case(hooked("weight_norm"), 1e-6),
    "spectral-norm": Case(parametrised("spectral_norm"), 0.0, merges=False),
    "spectral-norm-hook": Case(hooked("spectral_norm"), 0.0, merges=False),
    "orthogonal": Case(parametrised("orthogonal"), 0.0, merges=False),
}
