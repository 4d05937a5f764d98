"""HiRA against PEFT: the weight itself, modulated by a low-rank matrix.

PEFT leaves ``fan_in_fan_out`` at False for Conv1D, and its first adapter on a layer ignores
``rank_pattern``.
"""

from __future__ import annotations

from typing import ClassVar

from multigraft import HiraConfig, get_peft_model
from tests.methods.against_peft import LAYERS, Case, DropsLikePeft, StartsLikePeft

R = {"r": 3}


class TestHira(DropsLikePeft, StartsLikePeft):
    kind = "HiraConfig"
    cases: ClassVar = {
        "linear": Case("linear", R),
        "no bias": Case("linear wide", R),
        "Conv1D": Case("conv1d_transposed", R, loose=("fan_in_fan_out",)),
        "embedding": Case("embedding", R),
        "conv1d": Case("conv1d", R),
        "conv2d": Case("conv2d", R),
        "conv2d 1x1": Case("conv2d 1x1", R),
        "conv3d": Case("conv3d", R),
        "gaussian start": Case("linear", R | {"init_weights": "gaussian"}),
        "random start": Case("linear", R | {"init_weights": False}),
    }
    dropping: ClassVar = {
        layer: Case(layer, R | {"hira_dropout": 0.5})
        for layer in ("linear", "conv1d_transposed", "conv2d")
    }


def test_a_rank_pattern_sets_the_rank_of_its_sites() -> None:
    config = HiraConfig(r=3, target_modules=["layer"], rank_pattern={"layer": 2})
    model = get_peft_model(LAYERS["linear"](), config)
    assert model.get_parameter("base_model.model.layer.hira_A.default").shape == (2, 12)
