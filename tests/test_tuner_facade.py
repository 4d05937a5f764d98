"""What PEFT's users ask of a tuner, beside PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import multigraft
from multigraft.errors import AdapterNameError, TargetError, UnsupportedError
from multigraft.tuner import Tuner

BOTH = pytest.mark.parametrize("package", [peft, multigraft], ids=["peft", "multigraft"])
TUNERS = ["AdaLora", "Hira", "IA3", "LNTuning", "LoHa", "LoKr", "Lora", "OFT", "Vera"]
X = torch.eye(4)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def config(package: Any, target: str = "0") -> Any:
    return package.LoraConfig(r=2, target_modules=[target])


@dataclass
class Sizes:
    width: int = 3


@pytest.mark.parametrize("own", [None, {"a": 1}, Sizes(), transformers.LlamaConfig()], ids=type)
def test_a_models_config_is_given_as_a_dictionary(own: Any) -> None:
    model = base()
    if own is not None:
        model.config = own
    assert Tuner.get_model_config(model) == peft.LoraModel.get_model_config(model)


@pytest.mark.parametrize("name", TUNERS)
def test_tables_of_usual_modules_are_pefts(name: str) -> None:
    theirs = getattr(peft, f"{name}Model")
    ours = getattr(multigraft, f"{name}Model")
    assert ours.uses_shared_state == theirs.uses_shared_state
    table = getattr(theirs, "target_module_mapping", None)
    if table is not None:
        mine = ours.target_module_mapping
        assert {kind: sorted(mine[kind]) for kind in table} == {
            k: sorted(v) for k, v in table.items()
        }


def test_a_usual_module_that_is_added_to_the_table_is_meant() -> None:
    model = base()
    model.config = {"model_type": "of my own"}
    multigraft.LoraModel.target_module_mapping["of my own"] = ["1"]
    try:
        adapted = multigraft.get_peft_model(model, multigraft.LoraConfig(r=2))
    finally:
        del multigraft.LoraModel.target_module_mapping["of my own"]
    assert [layer.path for layer in adapted.base_model.layers()] == ["1"]


@BOTH
def test_a_config_that_was_put_in_place_is_injected(package: Any) -> None:
    model = package.get_peft_model(base(), config(package))
    tuner = model.base_model
    tuner.peft_config["second"] = config(package, "1")
    tuner.inject_adapter(tuner.model, "second")
    assert model.active_adapter == "default"
    names = [name for name, _ in model.named_parameters() if ".second." in name]
    assert names == [
        "base_model.model.1.lora_A.second.weight",
        "base_model.model.1.lora_B.second.weight",
    ]


@BOTH
def test_tensors_say_which_sites_are_meant(package: Any) -> None:
    model = package.get_peft_model(base(), config(package))
    tuner = model.base_model
    tuner.peft_config["second"] = config(package)
    tensors = {"1.lora_A.weight": torch.zeros(2, 4), "1.lora_B.weight": torch.zeros(4, 2)}
    tuner.inject_adapter(tuner.model, "second", state_dict=tensors)
    assert any("1.lora_A.second" in name for name, _ in model.named_parameters())
    assert not any("0.lora_A.second" in name for name, _ in model.named_parameters())


def test_only_what_is_in_place_and_not_attached_is_injected() -> None:
    model = multigraft.get_peft_model(base(), config(multigraft))
    tuner = model.base_model
    with pytest.raises(AdapterNameError, match=r"'second'.* is not in `peft_config`"):
        tuner.inject_adapter(tuner.model, "second")
    with pytest.raises(AdapterNameError, match=r"'default'.* has its adapter"):
        tuner.inject_adapter(tuner.model, "default")
    with pytest.raises(UnsupportedError, match="must be the tuner's own model"):
        tuner.inject_adapter(base(), "default")


def test_what_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = multigraft.get_peft_model(base(), config(multigraft))
    before, tuner = model(X), model.base_model
    tuner.peft_config["second"] = config(multigraft, "7")
    with pytest.raises(TargetError):
        tuner.inject_adapter(tuner.model, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(X), before)


def test_tensors_that_are_of_no_module_are_refused_by_name() -> None:
    model = base()
    tensors = {f"base_model.model.up.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(TargetError, match=r"at a module of this model: `up`\. Load it"):
        multigraft.inject_adapter_in_model(config(multigraft), model, state_dict=tensors)
    assert type(model[0]) is nn.Linear and not hasattr(model, "peft_config")
