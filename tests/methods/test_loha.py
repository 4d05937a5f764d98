"""LoHa against PEFT: the Hadamard product of two low-rank matrices.

PEFT's own backward of factored kernels takes the other factor's core for the gradient of A1 and A2.
"""

from __future__ import annotations

from typing import ClassVar

from tests.methods.against_peft import Case, DropsLikePeft, StartsLikePeft

R = {"r": 4, "alpha": 5}  # a scaling that float32, in which PEFT rounds it, holds exactly
PATTERNS = {"rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 7}}
EFFECTIVE = R | {"use_effective_conv2d": True}


class TestLoHa(DropsLikePeft, StartsLikePeft):
    kind = "LoHaConfig"
    cases: ClassVar = {
        "linear": Case("linear", R),
        "no bias": Case("linear wide", R),
        "conv1d": Case("conv1d", R),
        "conv2d": Case("conv2d", R),
        "conv2d 1x1": Case("conv2d 1x1", R),
        "effective conv1d": Case("conv1d", EFFECTIVE, gradients=False),
        "effective conv2d": Case("conv2d", EFFECTIVE, gradients=False),
        "effective conv2d 1x1": Case("conv2d 1x1", EFFECTIVE),
        "patterns": Case("linear", R | PATTERNS),
        "random start": Case("linear", R | {"init_weights": False}),
    }
    dropping: ClassVar = {
        "features": Case("linear", R | {"rank_dropout": 0.5}),
        "features of a conv2d": Case("conv2d", R | {"rank_dropout": 0.5}),
        "module": Case("linear", R | {"module_dropout": 0.5}),
        "both": Case("linear", R | {"module_dropout": 0.3, "rank_dropout": 0.3}),
    }
