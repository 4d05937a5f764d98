"""`save_embedding_layers`: the base's embeddings go with an adapter when they must."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from multigraft import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from tests.laws import fingerprint
from tests.oracle import VOCABULARY, build, inputs, llama, output, quiet

EMBEDDING, HEAD = "base_model.model.model.embed_tokens.", "base_model.model.lm_head."


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder that the base model is loaded from."""
    build(llama).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base(home: Path, rows: int | None = None) -> nn.Module:
    """The base, its vocabulary resized to so many rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(home)
    if rows is not None:
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def adapted(model: nn.Module, *targets: str, **more: Any) -> PeftModel:
    config = {"target_modules": [*targets] or ["q_proj"], "init_lora_weights": False, **more}
    return get_peft_model(model, LoraConfig(**config)).eval()


def keys(folder: Path) -> set[str]:
    names = load_file(folder / "adapter_model.safetensors").keys()
    return {k for k in names if k.startswith((EMBEDDING, HEAD))}


@pytest.mark.parametrize("choice", [True, False, "auto"])
@pytest.mark.parametrize("rows", [None, VOCABULARY + 3])
def test_what_is_saved_is_what_peft_saves(home: Path, tmp_path: Path, choice: Any, rows: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(base(home, rows)).save_pretrained(tmp_path / "ours", save_embedding_layers=choice)
        theirs = peft.get_peft_model(base(home, rows), peft.LoraConfig(target_modules=["q_proj"]))
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=choice)
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    has_them = choice is True or (choice == "auto" and rows is not None)
    assert bool(keys(tmp_path / "ours")) == has_them


def test_a_resized_vocabulary_is_noticed_and_said(home: Path, tmp_path: Path):
    with pytest.warns(MultigraftWarning, match="vocabulary was resized"):
        adapted(base(home, 48)).save_pretrained(tmp_path)
    assert keys(tmp_path) == {f"{EMBEDDING}weight", f"{HEAD}weight"}


def test_an_adapted_embedding_goes_with_its_head_when_resized(home: Path, tmp_path: Path):
    with pytest.warns(MultigraftWarning, match="vocabulary was resized"):
        adapted(base(home, 48), "embed_tokens").save_pretrained(tmp_path)
    assert {f"{EMBEDDING}base_layer.weight", f"{HEAD}weight"} < keys(tmp_path)


def test_what_the_adapter_copies_whole_is_not_repeated(home: Path):
    model = adapted(base(home, 48), modules_to_save=["embed_tokens"])
    with torch.no_grad():
        nn.init.ones_(model.get_base_model().model.embed_tokens.modules_to_save["default"].weight)
    state = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert torch.equal(state[f"{EMBEDDING}weight"], torch.ones(48, 16))
    assert f"{HEAD}weight" in state


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_a_gathered_state_dict_gives_the_matrices(home: Path, target: str):
    model = adapted(base(home), target)
    gathered = {key: torch.full_like(value, 2.0) for key, value in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=True)
    assert {k for k in state if k.startswith(EMBEDDING)}
    assert all(bool((value == 2.0).all()) for value in state.values())


def test_nothing_is_fetched_and_an_unknown_base_counts_as_it_is(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    model = build(llama)
    model.config._name_or_path = model.name_or_path = "nobody/no-such-model"
    model.resize_token_embeddings(48)
    adapted(model).save_pretrained(tmp_path)
    assert not keys(tmp_path)


def test_a_file_from_a_resized_model_gives_its_outputs_on_a_fresh_one(home: Path, tmp_path: Path):
    trained = base(home, 48)
    model = adapted(trained)
    batch = {"input_ids": torch.tensor([[1, 47, 45, 3]])}
    with quiet():
        model.save_pretrained(tmp_path)
    torch.manual_seed(9)  # so that the new rows differ
    fresh = transformers.AutoModelForCausalLM.from_pretrained(home)
    fresh.resize_token_embeddings(48, mean_resizing=False)
    before = fingerprint(fresh.eval())
    with pytest.warns(MultigraftWarning, match="has copies of its own"):
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(output(loaded, batch), output(model, batch))
    loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base(home, 48), tmp_path / "again").eval()
    torch.testing.assert_close(output(theirs, batch), output(model, batch))
    loaded.unload()
    assert fingerprint(fresh) == before


def test_pefts_file_from_a_resized_model_is_read(home: Path, tmp_path: Path):
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base(home, 48), config).eval()
    with quiet():
        theirs.save_pretrained(tmp_path)
    fresh = build(llama, seed=0)
    fresh.resize_token_embeddings(48)
    with quiet():
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    batch = inputs(loaded)
    torch.testing.assert_close(output(loaded, batch), output(theirs, batch))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("library", ["ours", "peft"])
def test_an_embedding_that_was_resized_and_adapted(library: str, tied: bool, tmp_path: Path):
    """The file has the whole matrix, and new rows of it are the adapter's from then on."""

    def resized(seed: int) -> nn.Module:
        model = build(lambda: llama(tie_word_embeddings=tied))
        torch.manual_seed(seed)
        model.resize_token_embeddings(48, mean_resizing=False)
        return model.eval()

    options = {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False, "r": 2}
    with quiet():
        if library == "peft":
            trained = peft.get_peft_model(resized(0), peft.LoraConfig(**options)).eval()
        else:
            trained = get_peft_model(resized(0), LoraConfig(**options)).eval()
        trained.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = resized(1)
    with torch.no_grad():  # a head that was not tied is no part of it
        if not tied:
            fresh.lm_head.weight.copy_(trained.base_model.model.lm_head.weight)
    before = fingerprint(fresh)
    with pytest.warns(MultigraftWarning, match=r"8 of model\.embed_tokens"):
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    batch = {"input_ids": torch.tensor([[1, 47, 45, 3]])}
    torch.testing.assert_close(output(loaded, batch), output(trained, batch))
    loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = PeftModel.from_pretrained(resized(1), tmp_path / "again").eval()
    if tied:
        torch.testing.assert_close(output(again, batch), output(trained, batch))
    loaded.unload()
    assert fingerprint(fresh) == before


def test_a_matrix_of_another_base_is_still_reported(home: Path, tmp_path: Path):
    adapted(base(home), "embed_tokens").save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.base_layer\.weight"):
        PeftModel.from_pretrained(build(llama, seed=5), tmp_path)


def test_matrices_that_are_the_bases_own_are_left_out(home: Path, tmp_path: Path):
    adapted(base(home)).save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(base(home), tmp_path)
    assert not loaded.peft_config["default"].modules_to_save


def test_a_model_that_was_not_resized_is_refused_with_the_number(home: Path, tmp_path: Path):
    with quiet():
        adapted(base(home, 48)).save_pretrained(tmp_path)
    model = base(home)
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=r"Call model\.resize_token_embeddings\(48\)"):
        PeftModel.from_pretrained(model, tmp_path)
    assert fingerprint(model) == before


def test_a_model_without_known_embeddings_says_so():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    with pytest.warns(MultigraftWarning, match="no embedding that is known"):
        assert len(get_peft_model_state_dict(model, save_embedding_layers=True)) == 2


@pytest.mark.parametrize("choice", ["yes", None, 2])
def test_another_choice_is_refused(home: Path, tmp_path: Path, choice: Any):
    with pytest.raises(ConfigError, match='must be True, False or "auto"'):
        adapted(base(home)).save_pretrained(tmp_path / "out", save_embedding_layers=choice)
    assert not (tmp_path / "out").exists()
