"""MiCA against PEFT: B at the weight's minor directions, and frozen."""

from __future__ import annotations

from typing import ClassVar

from tests.methods.against_peft import StartsLikePeft
from tests.variants.single import AgreesInSingle, Single

MICA = {"r": 3, "lora_alpha": 6, "init_lora_weights": "mica"}


class TestMica(AgreesInSingle, StartsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Single("linear", MICA),
        "no bias": Single("linear wide", MICA),
        "Conv1D": Single("conv1d_transposed", MICA),
        "embedding": Single("embedding", MICA),
        "rsLoRA": Single("linear", MICA | {"use_rslora": True}),
        "dropout in evaluation": Single("linear", MICA | {"lora_dropout": 0.5}),
    }
