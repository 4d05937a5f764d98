"""VeLoRA against PEFT: exact forwards, and A's gradient from compressed activations."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.methods.against_peft import Case, DropsLikePeft

VELORA = {"r": 4, "lora_alpha": 6, "velora_config": {"num_groups": 5, "scale": 1.7}}


class TestVelora(DropsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Case("linear", VELORA),
        "no bias": Case("linear wide", VELORA),
        "Conv1D": Case("conv1d_transposed", VELORA),
        "rsLoRA": Case("linear", VELORA | {"use_rslora": True}),
        "random": Case("linear", VELORA | {"velora_config": {"init_type": "random"}}),
        "dropout in evaluation": Case("linear", VELORA | {"lora_dropout": 0.5}),
        "bias": Case("linear", VELORA | {"lora_bias": True}),
    }
    dropping: ClassVar = {"linear": Case("linear", VELORA | {"lora_dropout": 0.5})}
