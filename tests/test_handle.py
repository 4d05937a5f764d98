"""What PEFT's users ask of a handle, beside PEFT; and pushing it to a hub of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers

import multigraft
from multigraft import PeftModel
from multigraft.errors import SourceError, StateError
from tests.hub_stand_in import StandIn, running, turn_to

X = torch.tensor([[1, 2, 3]])
BOTH = pytest.mark.parametrize("package", [peft, multigraft], ids=["peft", "multigraft"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running() as hub:
        turn_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


def base(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(package: Any = multigraft, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    config = package.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    return package.get_peft_model(base(dtype), config)


@BOTH
def test_it_tells_the_bases_dtype(package: Any) -> None:
    assert adapted(package, torch.bfloat16).base_model_torch_dtype is torch.bfloat16


@BOTH
def test_it_tells_whether_an_adapter_acts(package: Any) -> None:
    model = adapted(package)
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter


@BOTH
def test_it_tells_the_modules_that_are_trained_whole(package: Any) -> None:
    model = adapted(package)
    assert model.modules_to_save is None
    second = package.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("second", second)
    assert model.modules_to_save == {"lm_head"}


@BOTH
def test_gradients_can_be_let_in(package: Any) -> None:
    model = adapted(package)
    model.prepare_model_for_gradient_checkpointing(model.get_base_model())
    assert model.get_base_model().get_input_embeddings()(X).requires_grad


@BOTH
def test_a_card_says_what_peft_says(package: Any, tmp_path: Path) -> None:
    model = adapted(package)
    model.get_base_model().config._name_or_path = "me/base"
    model.get_base_model().name_or_path = "me/base"
    model.peft_config["default"].base_model_name_or_path = "me/base"
    model.create_or_update_model_card(str(tmp_path))
    data = huggingface_hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name) == ("me/base", "peft")
    assert data.pipeline_tag == "text-generation"
    assert {"base_model:adapter:me/base", "lora", "transformers"} <= set(data.tags)


def test_a_card_takes_what_it_was_trained_on_and_what_was_measured(tmp_path: Path) -> None:
    adapted().create_or_update_model_card(tmp_path, datasets=["me/verses"], metrics={"loss": 0.5})
    data = huggingface_hub.ModelCard.load(tmp_path / "README.md").data
    assert data.datasets == ["me/verses"]
    assert data.eval_results[0].metric_value == 0.5


def test_a_model_without_adapters_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no adapter"):
        PeftModel(base(), None).create_or_update_model_card(tmp_path)


def test_what_is_pushed_comes_back(hub: StandIn) -> None:
    model = adapted(init_lora_weights=False)
    address = model.push_to_hub("poems", token=hub.token, tags=["verse"], commit_message="First")
    assert address.startswith(f"{hub.url}/me/poems/commit/")
    assert hub.repositories["me/poems"].messages[-1] == "First"
    files = hub.files("me/poems")
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md", ".gitattributes"}
    assert files.keys() == expected
    assert {"verse", "lora"} <= set(
        huggingface_hub.ModelCard(files["README.md"].decode()).data.tags
    )
    again = PeftModel.from_pretrained(base(), "me/poems")
    assert torch.equal(again(X).logits, model(X).logits)


def test_peft_reads_what_was_pushed(hub: StandIn) -> None:
    model = adapted(init_lora_weights=False)
    model.push_to_hub("me/poems", token=hub.token)
    theirs = peft.PeftModel.from_pretrained(base(), "me/poems")
    torch.testing.assert_close(theirs(X).logits, model(X).logits)


def test_several_adapters_are_pushed_into_folders_or_those_that_are_named(hub: StandIn) -> None:
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    model.push_to_hub("both", token=hub.token)
    assert "second/adapter_model.safetensors" in hub.files("me/both")
    assert "adapter_model.safetensors" in hub.files("me/both")
    model.push_to_hub("one", token=hub.token, selected_adapters=["default"])
    assert "second/adapter_model.safetensors" not in hub.files("me/one")


def test_a_card_on_the_hub_keeps_its_text(hub: StandIn) -> None:
    text = b"---\nlicense: mit\n---\n# Mine\n\nWords.\n"
    hub.add("me/poems").commit({"README.md": text})
    adapted().push_to_hub("me/poems", token=hub.token)
    card = huggingface_hub.ModelCard(hub.files("me/poems")["README.md"].decode())
    assert card.text.strip() == "# Mine\n\nWords."
    assert (card.data.license, card.data.library_name) == ("mit", "peft")


def test_it_is_pushed_to_a_branch_or_as_a_proposal(hub: StandIn) -> None:
    hub.add("me/poems").commit({"notes": b""})
    model = adapted()
    model.push_to_hub("me/poems", token=hub.token, revision="next")
    assert "adapter_config.json" in hub.files("me/poems", "next")
    proposed = model.push_to_hub("me/poems", token=hub.token, create_pr=True)
    assert proposed.pr_url is not None
    assert "adapter_config.json" not in hub.files("me/poems")


def test_saving_pushes_when_that_is_asked_for(hub: StandIn, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "poems", push_to_hub=True, token=hub.token)
    assert json.loads(hub.files("me/poems")["adapter_config.json"])["r"] == 2
    assert (tmp_path / "poems" / "adapter_model.safetensors").is_file()
    model = adapted()
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/other", token=hub.token)
    assert "adapter_config.json" in hub.files("me/other")
    hub.requests.clear()
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/x", is_main_process=False)
    assert hub.requests == []


def test_a_card_that_the_hub_does_not_take_is_no_success(hub: StandIn) -> None:
    text = b"---\nbase_model: [not/an/id]\n---\n# Mine\n"
    hub.add("me/poems").commit({"README.md": text})
    with pytest.raises(SourceError, match=r'cannot be pushed to: .*"base_model" not/an/id'):
        adapted().push_to_hub("me/poems", token=hub.token)


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [("me/poems", "hf_wrong", "hf auth login"), ("a/b/c", "hf_right", "no name of a repository")],
)
def test_a_push_that_is_refused_says_why(hub: StandIn, name: str, token: str, words: str) -> None:
    with pytest.raises(SourceError, match=rf"`{name}` cannot be pushed to: .*{words}"):
        adapted().push_to_hub(name, token=token)


def test_offline_nothing_is_pushed(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE is set\. Unset it"):
        adapted().push_to_hub("me/poems", token=hub.token)
    assert hub.requests == []


def test_what_goes_wrong_in_saving_is_told_as_it_is(hub: StandIn) -> None:
    with pytest.raises(multigraft.AdapterNameError, match="third"):
        adapted().push_to_hub("me/poems", token=hub.token, selected_adapters=["third"])
    assert "adapter_config.json" not in hub.files("me/poems")


def test_a_hub_out_of_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as gone:
        turn_to(gone, tmp_path / "cache", monkeypatch)
    with pytest.raises(SourceError, match=r"`me/poems` cannot be pushed to: .*refused"):
        adapted().push_to_hub("me/poems", token="hf_right")
