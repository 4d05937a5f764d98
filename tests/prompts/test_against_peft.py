"""Context adapters agree with PEFT's: values, losses, gradients, generation, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import multigraft
from tests import oracle
from tests.prompts import pairs

LOSSES = [
    (method, model)
    for method, model in pairs.PAIRS
    # PEFT gives a tagger's loss labels of another length, and counts a reader's positions without
    # the virtual tokens; tests/prompts/test_labels.py has what is right.
    if not (method in pairs.TOKENS and model in ("bert_tagger", "bert_reader"))
    and model != "bert_encoder"
]
GENERATING = [(m, x) for m, x in pairs.PAIRS if x in pairs.GENERATORS]


@pytest.mark.parametrize(("method", "model"), pairs.PAIRS)
def test_the_same_seed_gives_the_same_output(method, model):
    pair = pairs.pair(method, model)
    batch = pairs.unlabelled(pair.batch)
    if model == "t5":
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    ours, theirs = oracle.output(pair.ours, batch), oracle.output(pair.theirs, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pair.ours.disable_adapter():
        base = oracle.output(pair.ours, batch)
    assert base.shape != ours.shape or not torch.allclose(base, ours, atol=1e-4)


@pytest.mark.parametrize(("method", "model"), LOSSES)
def test_loss_and_gradients_are_the_same(method, model):
    pair = pairs.pair(method, model)
    losses = []
    for adapted in (pair.ours, pair.theirs):
        losses.append(adapted(**pair.batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)
    ours, theirs = (_gradients(m) for m in (pair.ours, pair.theirs))
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("method", "model"), GENERATING)
@pytest.mark.parametrize("how", [{"max_new_tokens": 5}, {"num_beams": 3, "max_length": 12}])
def test_generation_is_the_same(method, model, how):
    pair = pairs.pair(method, model)
    batch = pairs.unlabelled(pair.batch)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    how = {**how, "do_sample": False, "eos_token_id": None, "output_scores": True}
    how["return_dict_in_generate"] = True
    ours, theirs = (m.generate(**batch, **how) for m in (pair.ours, pair.theirs))
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "model"), pairs.PAIRS)
def test_peft_reads_our_files_and_writes_the_same_ones(method, model, tmp_path):
    mine = pairs.ours(method, model)
    mine.save_pretrained(tmp_path / "ours")
    with oracle.quiet():
        read = peft.PeftModel.from_pretrained(_base(model), tmp_path / "ours").eval()
        read.save_pretrained(tmp_path / "theirs")
    batch = oracle.inputs(mine)
    torch.testing.assert_close(oracle.output(mine, batch), oracle.output(read, batch))
    ours, theirs = (_files(tmp_path / name) for name in ("ours", "theirs"))
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][key], theirs[1][key]) for key in ours[1])


@pytest.mark.parametrize(("method", "model"), pairs.PAIRS)
def test_we_read_pefts_files(method, model, tmp_path):
    other = pairs.theirs(method, model)
    with oracle.quiet():
        other.save_pretrained(tmp_path)
    read = multigraft.PeftModel.from_pretrained(_base(model), tmp_path).eval()
    batch = oracle.inputs(read)
    torch.testing.assert_close(oracle.output(read, batch), oracle.output(other, batch))
    assert not any(p.requires_grad for p in read.parameters())


def test_state_dicts_have_pefts_names():
    for method in pairs.TABLES:
        pair = pairs.pair(method, "llama")
        assert set(multigraft.get_peft_model_state_dict(pair.ours)) == {"prompt_embeddings"}
        own = {n for n in pair.ours.state_dict() if n.startswith("prompt_encoder.")}
        assert own == {n for n in pair.theirs.state_dict() if n.startswith("prompt_encoder.")}


def _base(model: str) -> Any:
    return oracle.build(pairs.MODELS[model][0])


def _files(folder: Path) -> tuple[dict, dict]:
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("modules_to_save"):  # PEFT writes the task's heads twice
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    return config, load_file(folder / "adapter_model.safetensors")


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """By name, without what each library puts before the base's own paths."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for prefix in ("base_model.model.", "base_model.", "prompt_encoder.default."):
                name = name.removeprefix(prefix)
            found[name.removeprefix("model.").replace("_orig", "")] = parameter.grad
    return found


def test_a_file_holds_what_peft_saved_for_the_end_of_its_name_alone(tmp_path):
    # To PEFT, "classifier" also means distilbert's "pre_classifier".
    sizes = {"token_dim": 16, "num_attention_heads": 2, "num_layers": 2}
    options = {**pairs.METHODS["prompt"], "task_type": "SEQ_CLS", **sizes}
    other = peft.get_peft_model(
        oracle.build(oracle.distilbert_classifier), oracle.peft_config(options)
    ).eval()
    other.save_pretrained(tmp_path)
    assert "base_model.pre_classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    base = oracle.build(oracle.distilbert_classifier)
    read = multigraft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert "pre_classifier" in read.active_peft_config.modules_to_save
    batch = oracle.inputs(read)
    torch.testing.assert_close(oracle.output(read, batch), oracle.output(other, batch))
