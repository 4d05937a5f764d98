"""From a config to the class of its task, and the function that every script begins with."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import multigraft
from multigraft import LoraConfig, TaskType, UnsupportedError, get_peft_model
from multigraft.auto import TASK_CLASSES, class_for
from tests.subject import Subject


def test_every_task_has_a_class_and_a_config_without_one_the_common_base() -> None:
    assert set(TASK_CLASSES) == set(TaskType)
    for task, klass in TASK_CLASSES.items():
        assert class_for(LoraConfig(task_type=task)) is klass
        assert issubclass(klass, multigraft.PeftModel)
    assert class_for(LoraConfig()) is multigraft.PeftModel


def test_a_task_may_be_said_by_name() -> None:
    assert class_for(LoraConfig(task_type="CAUSAL_LM")) is multigraft.PeftModelForCausalLM


def test_the_first_call_names_the_adapter_default_and_makes_it_active() -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config())
    assert (list(model.peft_config), model.active_adapter) == (["default"], "default")


def test_a_further_call_makes_its_own_adapter_the_active_one() -> None:
    subject = Subject()
    first = get_peft_model(subject.base, subject.config(), "a")
    second = get_peft_model(first, subject.config(), "b")
    assert first.active_adapters == second.active_adapters == ["b"]


def test_a_revision_is_noted_unless_the_config_has_one() -> None:
    subject = Subject()
    config = subject.config(["head"])
    model = get_peft_model(subject.base, config, revision="v2")
    model = get_peft_model(model, subject.config(["head"], revision="v1"), "b", revision="v2")
    assert [c.revision for c in model.peft_config.values()] == ["v2", "v1"]
    assert config.revision is None


@pytest.mark.parametrize("mixed", [True, False])
def test_mixed_can_do_no_more(mixed: bool) -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(), mixed=mixed)
    model.add_adapter("b", multigraft.IA3Config(target_modules=["head"], feedforward_modules=[]))
    model.base_model.set_adapter(["default", "b"])
    assert type(model) is (multigraft.PeftMixedModel if mixed else multigraft.PeftModel)
    assert model(subject.ids).shape == (2, 4, 5)


@pytest.mark.parametrize("low", [True, False])
def test_tensors_may_be_made_on_the_meta_device(low: bool) -> None:
    subject = Subject()
    model: Any = get_peft_model(subject.base, subject.config(["head"]), low_cpu_mem_usage=low)
    expected = "meta" if low else "cpu"
    assert {t.device.type for n, t in model.named_parameters() if "lora_" in n} == {expected}


@pytest.mark.parametrize("autocast", [True, False])
def test_a_half_precision_base_has_float32_adapters_unless_unwanted(autocast: bool) -> None:
    subject = Subject()
    model = get_peft_model(
        subject.base.bfloat16(), subject.config(), autocast_adapter_dtype=autocast
    )
    expected = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {expected}


def test_a_config_of_another_library_is_refused_and_the_model_is_untouched() -> None:
    import peft

    subject = Subject()
    with pytest.raises(UnsupportedError, match=r"multigraft\.LoraConfig"):
        get_peft_model(subject.base, peft.LoraConfig(target_modules=["head"]))  # type: ignore[arg-type]
    subject.assert_restored()


VALUES: list[dict[str, Any]] = [
    {"peft_type": "LORA", "r": 3, "target_modules": ["head"], "task_type": "CAUSAL_LM"},
    {"peft_type": multigraft.PeftType.IA3, "target_modules": ["a"], "feedforward_modules": []},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
]


@pytest.mark.parametrize("values", VALUES)
def test_a_config_is_made_of_a_dictionary_as_by_peft(values: dict[str, Any]) -> None:
    ours = multigraft.get_peft_config(values)
    theirs = peft.get_peft_config({**values, "peft_type": peft.PeftType(values["peft_type"])})
    assert type(ours).__name__ == type(theirs).__name__
    for key, value in values.items():
        their_value = getattr(theirs, key)
        same = sorted(their_value) if isinstance(their_value, set) else their_value
        assert getattr(ours, key) == same == value


def test_a_dictionary_without_a_method_or_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(multigraft.ConfigError, match="no `peft_type`"):
        multigraft.get_peft_config({"r": 3})
    with pytest.raises(UnsupportedError, match="NONE"):
        multigraft.get_peft_config({"peft_type": "NONE"})
    for library in (multigraft, peft):
        with pytest.raises(TypeError, match="rr"):
            library.get_peft_config({"peft_type": "LORA", "rr": 3})


def test_the_table_of_configs_is_pefts_as_far_as_methods_are_here() -> None:
    ours = multigraft.PEFT_TYPE_TO_CONFIG_MAPPING
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert len(ours) == len(list(ours)) > 10
    for kind, config in ours.items():
        assert config.__name__ == theirs[peft.PeftType(kind)].__name__
    assert ours["LORA"] is ours[multigraft.PeftType.LORA] is LoraConfig  # type: ignore[index]
    assert "NONE" not in ours
    with pytest.raises(KeyError):
        ours["NONE"]  # type: ignore[index]


def test_the_table_of_task_classes_is_pefts() -> None:
    ours = multigraft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    theirs = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    assert {str(task): kind.__name__ for task, kind in ours.items()} == {
        task: kind.__name__ for task, kind in theirs.items()
    }
