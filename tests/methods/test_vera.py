"""VeRA against PEFT: two trained vectors around projections that all sites share."""

from __future__ import annotations

from typing import ClassVar

from tests.methods.against_peft import Case, DropsLikePeft, StartsLikePeft, Two

KEY = {"r": 5, "projection_prng_key": 42}
BOTH = KEY | {"target_modules": ["0", "1"]}


class TestVera(DropsLikePeft, StartsLikePeft):
    kind = "VeraConfig"
    cases: ClassVar = {
        "linear": Case("linear", KEY),
        "no bias": Case("linear wide", KEY),
        "Conv1D": Case("conv1d_transposed", KEY),
        "two sites": Case(Two, BOTH),
        "projection not saved": Case(Two, BOTH | {"save_projection": False}),
        "initial d": Case("linear", KEY | {"d_initial": 0.7}),
        "random start": Case("linear", KEY | {"init_weights": False}),
        "another key": Case("linear", {"r": 3, "projection_prng_key": 1}),
    }
    dropping: ClassVar = {"input": Case("linear", KEY | {"vera_dropout": 0.5})}
