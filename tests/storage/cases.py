"""Every storage that tests run over: a name, and how to make a layer of it.

    for name, case in CASES.items():
        layer = case.build(nn.Linear(64, 64))  # from this linear, which is left as it was
        layer = case.make(64, 32, seed=1)  # the same from sizes

`case.dtype` is what inputs take. `case.error` bounds ``‖read(write(W)) - W‖ / ‖W‖`` for normal
values; 0.0 is exact. `case.lossy` says that the format is quantised (its ``is_exact`` is False),
`case.merges` that the weight can be written, `case.convolves` that `build` takes an `nn.Conv2d` as
well. `EXACT`, `LOSSY` and `REFUSED` list names by what a merge does.

Sizes are multiples of 32; the input's of 64 for 4-bit layers: with others bitsandbytes 0.50 on the
CPU dequantises wrongly (its forward too), and fails in evaluation where it packs weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Case:
    """One storage.

    Args:
        build: makes a layer of this storage from a layer, which it leaves alone.
        error: bound of the relative rounding error of one write.
        dtype: dtype of inputs.
        lossy: whether the format is quantised.
        merges: whether the weight can be written.
        convolves: whether `build` takes convolutions too.
    """

    build: Build
    error: float
    dtype: torch.dtype = torch.float32
    lossy: bool = False
    merges: bool = True
    convolves: bool = False

    def make(self, in_: int, out: int, *, bias: bool = True, seed: int = 0) -> nn.Module:
        """A layer of this storage with random values, drawn without touching the global state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(nn.Linear(in_, out, bias=bias))


def dense(dtype: torch.dtype) -> Build:
    return lambda linear: copy.deepcopy(linear).to(dtype)


def float8(linear: Any) -> nn.Module:
    """Stored in 8 bits, cast for the length of a forward, as layer-wise casting does it."""
    layer = copy.deepcopy(linear)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        module.__dict__["stored"] = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(module.weight.to(args[0].dtype), False)

    def narrow(module: nn.Module, args: object, output: object) -> None:
        module._parameters["weight"] = module.__dict__.pop("stored")

    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(narrow)
    return layer


def bnb4(quant_type: str, double: bool) -> Build:
    def build(linear: Any) -> nn.Module:
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


def bnb8(linear: Any) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    has_bias = linear.bias is not None
    layer = Linear8bitLt(
        linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def torchao(config: str, dtype: torch.dtype = torch.float32) -> Build:
    def build(linear: Any) -> nn.Module:
        from torchao import quantization

        holder = nn.Sequential(copy.deepcopy(linear).to(dtype))
        quantization.quantize_(holder, getattr(quantization, config)())
        return holder[0]

    return build


def parametrised(name: str) -> Build:
    def build(linear: Any) -> nn.Module:
        from torch.nn.utils import parametrizations

        return getattr(parametrizations, name)(copy.deepcopy(linear))

    return build


def hooked(name: str) -> Build:
    def build(linear: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(torch.nn.utils, name)(copy.deepcopy(linear))

    return build


CASES: dict[str, Case] = {
    "float64": Case(dense(torch.float64), 0.0, torch.float64, convolves=True),
    "float32": Case(dense(torch.float32), 0.0, convolves=True),
    "bfloat16": Case(dense(torch.bfloat16), 2**-8, torch.bfloat16, convolves=True),
    "float16": Case(dense(torch.float16), 2**-11, torch.float16, convolves=True),
    "float8": Case(float8, 2**-4, convolves=True),
    "bnb-nf4": Case(bnb4("nf4", False), 0.11, lossy=True),
    "bnb-nf4-double": Case(bnb4("nf4", True), 0.11, lossy=True),
    "bnb-fp4": Case(bnb4("fp4", False), 0.16, lossy=True),
    "bnb-fp4-double": Case(bnb4("fp4", True), 0.16, lossy=True),
    "bnb-int8": Case(bnb8, 0.01, lossy=True),
    "torchao-int8": Case(torchao("Int8WeightOnlyConfig"), 0.01, lossy=True),
    "torchao-int8-bf16": Case(
        torchao("Int8WeightOnlyConfig", torch.bfloat16), 0.01, torch.bfloat16, lossy=True
    ),
    "torchao-float8": Case(torchao("Float8WeightOnlyConfig"), 0.04, lossy=True),
    "torchao-intx": Case(torchao("IntxWeightOnlyConfig"), 0.01, lossy=True),
    "weight-norm": Case(parametrised("weight_norm"), 1e-6, convolves=True),
    "weight-norm-hook": Case(hooked("weight_norm"), 1e-6, convolves=True),
    "spectral-norm": Case(parametrised("spectral_norm"), 0.0, merges=False, convolves=True),
    "spectral-norm-hook": Case(hooked("spectral_norm"), 0.0, merges=False, convolves=True),
    "orthogonal": Case(parametrised("orthogonal"), 0.0, merges=False),
}
LOSSY = [name for name, case in CASES.items() if case.lossy]
EXACT = [name for name, case in CASES.items() if case.merges and not case.lossy]
REFUSED = [name for name, case in CASES.items() if not case.merges]
