"""Pushing to a local stand-in of the hub, pipelines and generation with adapted models."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from multigraft import PeftModel, get_peft_model, inject_adapter_in_model
from tests.integrations.small_trainer import base, config, trainer

MODES = pytest.mark.parametrize(
    "make",
    [
        lambda: get_peft_model(base(), config(task_type="CAUSAL_LM")),
        lambda: inject_adapter_in_model(config(), base()),
    ],
    ids=["wrapped", "in_place"],
)
Make = Callable[[], nn.Module]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Texts of the files that would go to the hub, upload by upload; binary ones are empty."""
    found: list[dict[str, str]] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self: Any, *, folder_path: str, **options: Any) -> Any:
        files = (p for p in Path(folder_path).iterdir() if p.is_file())
        found.append({p.name: p.read_text() if p.suffix == ".md" else "" for p in files})
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return found


@MODES
def test_what_is_pushed_is_the_adapter_and_its_card(
    make: Make, uploads: list[dict[str, str]], tmp_path: Path
):
    options = {"push_to_hub": True, "hub_model_id": "tiny", "hub_strategy": "every_save"}
    subject = trainer(make(), tmp_path, save_steps=2, **options)
    subject.train()
    subject.push_to_hub()
    assert len(uploads) == 3
    for files in uploads:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
        assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & files.keys()
    card = uploads[-1]["README.md"]
    assert huggingface_hub.ModelCard(card).data.library_name == "peft"
    assert {"lora", "generated_from_trainer"} <= set(huggingface_hub.ModelCard(card).data.tags)
    assert "## Training procedure" in card  # the trainer's own text is kept


@MODES
def test_a_pipeline_gives_what_the_model_gives(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2"
    )
    model = make().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipe("w3 w4", max_new_tokens=4, do_sample=False, return_full_text=False)
    asked = torch.tensor([[3, 4]])
    ids = model.generate(input_ids=asked, max_new_tokens=4, do_sample=False)[0, 2:]
    assert found[0]["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)
    alone = base().eval().generate(input_ids=asked, max_new_tokens=4, do_sample=False)[0, 2:]
    assert ids.tolist() != alone.tolist()
    assert "is not supported for" not in caplog.text


def test_pushing_while_saving_in_place_is_refused_with_the_way_to_do_it(tmp_path: Path):
    model = inject_adapter_in_model(config(), base())
    with pytest.raises(ValueError, match=r"Call model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_pushing_a_model_that_was_adapted_in_place_sends_its_adapter(
    monkeypatch: pytest.MonkeyPatch,
):
    sent: list[set[str]] = []
    model = inject_adapter_in_model(config(), base())

    def upload(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        sent.append({p.name for p in Path(folder).iterdir()})

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    api = huggingface_hub.HfApi
    named = lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)  # noqa: E731
    monkeypatch.setattr(api, "create_repo", named)
    model.push_to_hub("me/tiny")
    assert sent == [{"adapter_config.json", "adapter_model.safetensors", "README.md"}]


def test_transformers_words_for_adapters_mean_ours(tmp_path: Path):
    model = inject_adapter_in_model(config(), base())
    model.add_adapter(config(), "second")
    assert model.active_adapters() == ["second"]
    model.set_adapter("default")
    nn.init.normal_(model.model.layers[0].mlp.down_proj.lora_B["default"].weight)
    ids = torch.tensor([[3, 4, 5]])
    adapted, plain = model(ids).logits, base()(ids).logits
    assert (adapted - plain).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(model(ids).logits, plain)
    model.enable_adapters()
    assert len(model.get_adapter_state_dict("second")) == 8
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "second"}
    model.delete_adapter(["default", "second"])
    torch.testing.assert_close(model(ids).logits, plain)
    again = inject_adapter_in_model(config(), model, "other")
    again.load_adapter(tmp_path, "default")
    assert again.active_adapters() == ["default"]
    torch.testing.assert_close(again(ids).logits, adapted)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(ids).logits, adapted)
