"""LoKr against PEFT: a Kronecker product of two small matrices."""

from __future__ import annotations

from typing import ClassVar

from tests.methods.against_peft import Case, DropsLikePeft, StartsLikePeft

R = {"r": 2, "alpha": 5}
PATTERNS = {"rank_pattern": {"layer": 1}, "alpha_pattern": {"layer": 7}}
DROPOUT = {"rank_dropout": 0.5, "rank_dropout_scale": True}


class TestLoKr(DropsLikePeft, StartsLikePeft):
    kind = "LoKrConfig"
    cases: ClassVar = {
        "linear": Case("linear", R | {"r": 1}),
        "no bias": Case("linear wide", R),
        "whole second factor": Case("linear", R | {"r": 12}),
        "both decomposed": Case("linear", R | {"r": 1, "decompose_both": True}),
        "by a factor": Case("linear", R | {"decompose_factor": 2}),
        "by a factor that does not divide": Case("linear", R | {"decompose_factor": 5}),
        "conv1d": Case("conv1d", R | {"r": 1}),
        "whole conv1d": Case("conv1d", R | {"r": 12}),
        "conv2d": Case("conv2d", R | {"r": 1}),
        "whole conv2d": Case("conv2d", R | {"r": 12}),
        "conv2d 1x1": Case("conv2d 1x1", R | {"r": 1}),
        "effective conv2d": Case("conv2d", R | {"r": 1, "use_effective_conv2d": True}),
        "rank dropout scale in evaluation": Case("linear", R | DROPOUT),
        "patterns": Case("linear", R | PATTERNS),
        "lycoris start": Case("linear", R | {"init_weights": "lycoris"}),
        "random start": Case("linear", R | {"init_weights": False}),
    }
    dropping: ClassVar = {
        "features": Case("linear", R | {"rank_dropout": 0.5}),
        "features of a conv2d": Case("conv2d", R | {"rank_dropout": 0.5}),
        "module": Case("linear", R | {"module_dropout": 0.5}),
        "both": Case("linear", R | {"module_dropout": 0.3, "rank_dropout": 0.3}),
    }
