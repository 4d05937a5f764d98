"""PEFT's helpers under PEFT's names, with PEFT's arguments in PEFT's order."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import peft
import pytest
from peft.tuners.lora import config as their_configs
from peft.tuners.lora.loraga import preprocess_loraga

import multigraft

HELPERS = [
    ("get_eva_state_dict", peft.get_eva_state_dict),
    ("initialize_lora_eva_weights", peft.initialize_lora_eva_weights),
    ("replace_lora_weights_loftq", peft.replace_lora_weights_loftq),
    ("preprocess_loraga", preprocess_loraga),
]


def parameters(function: Any) -> list[tuple[str, Any]]:
    """Names and plain defaults; a default that is a function counts by its name."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, getattr(p.default, "__name__", p.default)) for p in found]


@pytest.mark.parametrize(("name", "theirs"), HELPERS)
def test_arguments_and_defaults_are_pefts(name: str, theirs: Any) -> None:
    assert parameters(getattr(multigraft, name)) == parameters(theirs)


def test_preprocess_corda_has_pefts_arguments() -> None:
    """PEFT's own cannot be imported without a package that it does not require."""
    expected = ["model", "lora_config", "run_model", "hooked_model"]
    assert [name for name, _ in parameters(multigraft.preprocess_corda)] == expected


@pytest.mark.parametrize("name", ["EvaConfig", "CordaConfig", "LoraGAConfig", "LoftQConfig"])
def test_options_and_defaults_are_pefts(name: str) -> None:
    mine, theirs = getattr(multigraft, name), getattr(their_configs, name)
    assert [(f.name, f.default) for f in dataclasses.fields(mine)] == [
        (f.name, f.default) for f in dataclasses.fields(theirs)
    ]


def test_saving_has_pefts_arguments_in_pefts_order() -> None:
    mine, theirs = (
        list(inspect.signature(library.PeftModel.save_pretrained).parameters)
        for library in (multigraft, peft)
    )
    assert mine[: len(theirs) - 1] == theirs[:-1]
