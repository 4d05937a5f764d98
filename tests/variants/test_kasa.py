"""KaSA against PEFT, which changes the base for good; here the base keeps its bits."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.variants.single import AgreesInSingle, Single

KASA = {"r": 3, "lora_alpha": 6, "kasa_config": {"beta": 0.02, "gamma": 0.05}}


class TestKasa(AgreesInSingle):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Single("linear", KASA),
        "no bias": Single("linear wide", KASA),
        "rsLoRA": Single("linear", KASA | {"use_rslora": True}),
        "dropout in evaluation": Single("linear", KASA | {"lora_dropout": 0.5}),
        "bias": Single("linear", KASA | {"lora_bias": True}),
    }
