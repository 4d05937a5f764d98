"""`target_modules` None means the same modules as in PEFT, for every method and architecture."""

from __future__ import annotations

import pytest
from peft.utils import constants

from multigraft import IA3Config, LNTuningConfig, get_peft_model
from multigraft.methods import METHODS, ia3
from multigraft.methods.lora import LoraConfig
from tests import oracle

NAMES = {
    "ADALORA": "ADALORA",
    "HIRA": "HIRA",
    "IA3": "IA3",
    "LN_TUNING": "LNTUNING",
    "LOHA": "LOHA",
    "LOKR": "LOKR",
    "LORA": "LORA",
    "OFT": "OFT",
    "VERA": "VERA",
}


def in_order(table: object) -> dict[str, object]:
    """A table with its lists sorted: PEFT reads them as sets."""
    assert isinstance(table, dict)
    return {k: sorted(v) if isinstance(v, list) else v for k, v in table.items()}


@pytest.mark.parametrize("method", NAMES)
def test_the_tables_agree(method: str) -> None:
    theirs = in_order(
        getattr(constants, f"TRANSFORMERS_MODELS_TO_{NAMES[method]}_TARGET_MODULES_MAPPING")
    )
    ours = in_order(METHODS[method].default_targets)
    assert {name: ours.get(name) for name in theirs} == theirs
    if method != "ADALORA":  # PEFT's leaves out architectures that its LoRA knows
        assert ours == theirs


def test_the_feedforward_tables_agree() -> None:
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert theirs == ia3.FEEDFORWARD


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (LoraConfig(), "q_proj"),
        (IA3Config(), "down_proj"),
        (LNTuningConfig(), "input_layernorm"),
    ],
)
def test_the_models_own_config_names_what_none_meant(config: object, first: str) -> None:
    model = get_peft_model(oracle.llama(), config)
    assert sorted(model.peft_config["default"].target_modules)[0] == first
