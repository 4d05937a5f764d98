"""An adapter's files alone give base and adapter, as with PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import multigraft
from multigraft import ConfigError, UnsupportedError
from tests.hub_stand_in import running, turn_to
from tests.tiny_base import write_base

IDS = torch.tensor([[1, 2, 3]])


def saved(folder: Path, task: str | None = "CAUSAL_LM") -> Path:
    write_base(folder / "base")
    kind = transformers.AutoModelForCausalLM if task else transformers.LlamaModel
    base = kind.from_pretrained(folder / "base")
    config = multigraft.LoraConfig(
        target_modules=["q_proj"], task_type=task, init_lora_weights=False
    )
    model = multigraft.get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_base_and_adapter_come_from_the_adapters_files_as_with_peft(
    task: str | None, tmp_path: Path
) -> None:
    folder = saved(tmp_path, task)
    name = "AutoPeftModelForCausalLM" if task else "AutoPeftModel"
    ours = getattr(multigraft, name).from_pretrained(str(folder))
    theirs = getattr(peft, name).from_pretrained(str(folder))
    assert type(ours).__name__ == type(theirs).__name__
    assert type(ours.get_base_model()) is type(theirs.get_base_model())
    assert not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(ours(IDS)[0], theirs(IDS)[0])


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "hub"])
def test_tokens_that_the_adapter_brought_along_have_room(
    is_remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1800)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    with running() as hub:
        turn_to(hub, tmp_path / "cache", monkeypatch)
        hub.add("me/poems", folder)
        source = "me/poems" if is_remote else str(folder)
        model = multigraft.AutoPeftModelForCausalLM.from_pretrained(source)
        assert ("me/poems" in str(hub.requests)) == is_remote
    assert model.get_base_model().get_input_embeddings().weight.shape[0] == 1800


def test_another_tasks_class_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(ConfigError, match="Use AutoPeftModelForCausalLM"):
        multigraft.AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="Use AutoPeftModelForCausalLM"):
        multigraft.AutoPeftModel.from_pretrained(folder)


def test_a_file_cannot_have_any_package_imported(tmp_path: Path) -> None:
    folder = saved(tmp_path, None)
    with pytest.raises(UnsupportedError, match="wants to import `transformers"):
        multigraft.AutoPeftModel.from_pretrained(folder, import_allowlist=["other"])


def test_none_is_made_by_its_constructor() -> None:
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        multigraft.AutoPeftModelForCausalLM()
