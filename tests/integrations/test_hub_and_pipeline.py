"""Pushing to a local stand-in of the hub, pipelines and generation with adapted models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from multigraft import PeftModel, get_peft_model, inject_adapter_in_model
from tests.hub_stand_in import StandIn, running, turn_to
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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running() as hub:
        turn_to(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers where
        yield hub


@MODES
def test_what_the_trainer_pushes_is_the_adapter_and_its_card(
    make: Make, hub: StandIn, tmp_path: Path
):
    options = {"push_to_hub": True, "hub_model_id": "tiny", "hub_strategy": "every_save"}
    subject = trainer(make(), tmp_path / "run", save_steps=2, hub_token=hub.token, **options)
    subject.train()
    subject.push_to_hub()
    repository = hub.repositories["me/tiny"]
    assert len(repository.messages) >= 3  # the repository's own, and what was pushed
    for files in repository.commits.values():
        assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & files.keys()
    files = hub.files("me/tiny")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {"lora", "generated_from_trainer"} <= set(card.data.tags)
    assert "## Training procedure" in card.text  # the trainer's own text is kept
    again = PeftModel.from_pretrained(base(), "me/tiny").eval()
    ids = torch.tensor([[3, 4, 5]])
    found = subject.model.eval()(ids).logits
    torch.testing.assert_close(again(ids).logits, found)
    assert (found - base().eval()(ids).logits).abs().max() > 1e-4


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


def test_pushing_a_model_that_was_adapted_in_place_sends_its_adapter(hub: StandIn):
    model = inject_adapter_in_model(config(), base())
    model.push_to_hub("me/tiny", token=hub.token)
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md", ".gitattributes"}
    assert hub.files("me/tiny").keys() == expected
    other = inject_adapter_in_model(config(), base())
    other.load_adapter("me/tiny", "other")
    assert other.active_adapters() == ["other"]


def test_pushing_a_base_that_a_handle_adapted_sends_the_base(hub: StandIn):
    model = get_peft_model(base(), config())
    model.get_base_model().push_to_hub("me/base", token=hub.token)
    assert "model.safetensors" in hub.files("me/base")
    assert "adapter_config.json" not in hub.files("me/base")


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
