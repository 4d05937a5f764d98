"""The handle that scripts hold: what it passes on, counts, prints and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import PeftModel, RoutingError, StateError, get_peft_model
from tests import oracle
from tests.oracle import build
from tests.subject import Net, Subject


@pytest.fixture
def subject() -> Subject:
    return Subject()


@pytest.fixture
def model(subject: Subject) -> PeftModel:
    """`default` on all linear layers, `b` on the head; `default` is active."""
    model = get_peft_model(subject.base, subject.config())
    model.add_adapter("b", subject.config(["head"]))
    return model


class Scaled(Net):
    """Takes more than tensors, and has a method of its own."""

    def forward(self, ids: Tensor, *, factor: float = 1.0) -> Tensor:  # type: ignore[override]
        return factor * super().forward(ids)

    def hello(self) -> str:
        return "hello"


def test_arguments_and_attributes_are_the_bases_own(subject: Subject) -> None:
    model = get_peft_model(Scaled().double(), subject.config())
    torch.testing.assert_close(model(subject.ids, factor=2.0), 2 * model(ids=subject.ids))
    assert model.hello() == "hello"
    assert model.head is model.get_base_model().head
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_the_base_is_adapted_in_place(subject: Subject, model: PeftModel) -> None:
    assert model.get_base_model() is subject.base
    assert torch.equal(model(subject.ids), subject.base(subject.ids))


@pytest.mark.parametrize("training", [True, False])
def test_a_handle_is_in_its_bases_mode(subject: Subject, training: bool) -> None:
    model = get_peft_model(subject.base.train(training), subject.config())
    assert all(module.training is training for module in model.modules())


def test_each_row_uses_its_own_adapter(subject: Subject, model: PeftModel) -> None:
    names = ["b", "__base__"]
    mixed = model(subject.ids, adapter_names=names)
    model.set_adapter("b")
    torch.testing.assert_close(mixed[0], model(subject.ids)[0])
    torch.testing.assert_close(mixed[1], subject.pristine(subject.ids)[1])
    assert model.roster.route is None


def test_rows_are_counted_by_the_first_tensor_wherever_it_stands(
    subject: Subject, model: PeftModel
) -> None:
    by_name = model(ids=subject.ids, adapter_names=["b", "b"])
    assert torch.equal(by_name, model(subject.ids, adapter_names=["b", "b"]))
    with pytest.raises(RoutingError, match="3 names for a batch of 2 rows"):
        model(ids=subject.ids, adapter_names=["b"] * 3)
    with pytest.raises(RoutingError, match="no tensor was given"):
        model(adapter_names=["b"])


def test_counts_and_their_print_are_of_the_adapters_and_the_whole(
    model: PeftModel, capsys: pytest.CaptureFixture[str]
) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    share = f"{100 * trainable / total:.4f}"
    expected = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}"
    assert capsys.readouterr().out == f"{expected}\n"


def test_one_active_adapter_is_a_name_and_several_are_a_list(model: PeftModel) -> None:
    assert model.active_adapter == "default"
    model.base_model.set_adapter(["default", "b"])
    assert model.active_adapter == model.active_adapters == ["default", "b"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.peft_type == "LORA"
    model.set_adapter([])
    assert model.active_adapter == []
    with pytest.raises(StateError, match="no adapter is active"):
        _ = model.active_peft_config


def test_configs_note_the_base_that_they_belong_to(subject: Subject) -> None:
    base: Any = build(oracle.llama)
    base.name_or_path = "someone/base"
    model = get_peft_model(base, multigraft.LoraConfig())
    assert model.peft_config["default"].base_model_name_or_path == "someone/base"
    named = multigraft.LoraConfig(base_model_name_or_path="another/base")
    model.add_adapter("b", named)
    assert model.peft_config["b"].base_model_name_or_path == "another/base"


@pytest.mark.parametrize("maker", [oracle.bert_classifier, oracle.bert_tagger, oracle.bert_reader])
def test_a_tasks_class_trains_its_head_in_every_adapter(maker: Any) -> None:
    kind = {"bert_classifier": "SEQ_CLS", "bert_tagger": "TOKEN_CLS", "bert_reader": "QUESTION_ANS"}
    config = multigraft.LoraConfig(task_type=kind[maker.__name__])
    model = get_peft_model(build(maker), config)
    model.add_adapter("b", config)
    for name in ("default", "b"):
        state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
        heads = {key.split(".")[2] for key in state if "lora_" not in key}
        assert len(heads & {"classifier", "qa_outputs"}) == 1
    assert config.modules_to_save is None


def test_a_file_without_a_task_notes_the_class_of_its_base(
    subject: Subject, model: PeftModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    config = multigraft.PeftConfig.from_pretrained(tmp_path)
    assert config.auto_mapping == {
        "base_model_class": "Net",
        "parent_library": "tests.subject",
    }
    assert model.peft_config["default"].auto_mapping is None


def test_other_processes_write_nothing(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_loaded_class_is_that_of_the_files_task_unless_one_is_named(tmp_path: Path) -> None:
    config = multigraft.LoraConfig(task_type="CAUSAL_LM")
    get_peft_model(build(oracle.llama), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(oracle.llama), tmp_path)
    assert type(loaded) is multigraft.PeftModelForCausalLM
    named = multigraft.PeftModelForFeatureExtraction.from_pretrained(build(oracle.llama), tmp_path)
    assert type(named) is multigraft.PeftModelForFeatureExtraction


def test_a_handle_is_a_module_like_any_other(subject: Subject, model: PeftModel) -> None:
    names = [name for name, _ in model.named_modules()]
    assert names[:3] == ["", "base_model", "base_model.model"]
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 5
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(bool((p == 0).all()) for p in model.parameters())
