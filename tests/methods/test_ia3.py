"""IA3 against PEFT: one vector that scales the layer's output, or its input."""

from __future__ import annotations

from typing import ClassVar

from tests.methods.against_peft import Case, StartsLikePeft

KEYS = {"feedforward_modules": []}
FEEDFORWARD = {"feedforward_modules": ["layer"]}


class TestIA3(StartsLikePeft):
    kind = "IA3Config"
    cases: ClassVar = {
        "output of a linear": Case("linear", KEYS),
        "input of a linear": Case("linear", FEEDFORWARD),
        "output without bias": Case("linear wide", KEYS),
        "input without bias": Case("linear wide", FEEDFORWARD),
        "output of a Conv1D": Case("conv1d_transposed", KEYS),
        "input of a Conv1D": Case("conv1d_transposed", FEEDFORWARD),
        "output of a conv2d": Case("conv2d", KEYS),
        "input of a conv2d": Case("conv2d", FEEDFORWARD),
        "output of a conv3d": Case("conv3d", KEYS),
        "input of a conv3d": Case("conv3d", FEEDFORWARD),
        "feedforward by expression": Case("linear", {"feedforward_modules": "lay.*"}),
        "random start": Case("linear", KEYS | {"init_ia3_weights": False}),
    }
