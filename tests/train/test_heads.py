"""Heads that a base lacks, over architectures whose heads differ."""

from __future__ import annotations

import pytest
import torch

from multigraft import CheckpointError, ConfigError, LoraConfig, PeftModel
from multigraft.train.heads import fresh_in, mark_fresh
from multigraft.train.load import attach
from multigraft.train.tasks import task_of

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
# The class that pre-training leaves, its config, and what a classifier has besides.
BASES = {
    "BertForMaskedLM": (SMALL, {"bert.pooler", "classifier"}),
    "RobertaForMaskedLM": (SMALL, {"classifier"}),
    "DebertaV2ForMaskedLM": (SMALL, {"classifier", "pooler"}),
    "ElectraForPreTraining": (SMALL, {"classifier"}),
    "LlamaForCausalLM": (SMALL, {"score"}),
    "DistilBertForMaskedLM": (
        {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        {"classifier", "pre_classifier"},
    ),
    "GPT2LMHeadModel": (
        {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        {"score"},
    ),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        {"classification_head"},
    ),
    "BartForConditionalGeneration": (
        {
            "vocab_size": 40,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
        },
        {"classification_head"},
    ),
}
TASK = task_of({"name": "seq-cls", "labels": ["a", "b", "c"], "problem": "single"})


def written(name, folder, **config):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**{**BASES[name][0], **config})).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", list(BASES))
def test_what_is_fresh_is_trained_saved_and_reloaded(name, tmp_path):
    folder = written(name, tmp_path / "base")
    model = attach(
        TASK.load(folder, device="cpu"),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
        "default",
        task_type=TASK.task_type,
    )
    saved = set(model.peft_config["default"].modules_to_save)
    assert saved >= BASES[name][1]
    own = {id(p) for p in model.roster.parameters("default")}
    for parameter in model.roster.parameters("default"):
        parameter.data.add_(0.05)
    copies = [n for n, p in model.named_parameters() if "modules_to_save" in n and id(p) in own]
    assert copies
    end = getattr(model.config, "eos_token_id", None) or 1
    ids = torch.tensor([[5, 6, 7, end], [8, 9, 10, end]])
    mask = torch.ones_like(ids)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(TASK.load(folder, device="cpu"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    assert expected.shape == (2, 3)


def test_a_config_that_saves_no_modules_is_refused():
    model = torch.nn.Module()
    model.score = torch.nn.Linear(2, 2)
    mark_fresh("m", model, ["score.weight", "score.bias"])
    with pytest.raises(ConfigError, match=r"has no `modules_to_save`.*score"):
        fresh_in(model, object())


def test_modules_that_a_config_names_itself_stay():
    model = torch.nn.Module()
    model.score = torch.nn.Linear(2, 2)
    mark_fresh("m", model, ["score.weight", "score.bias"])
    found = fresh_in(model, LoraConfig(modules_to_save=["norm", "score"]))
    assert found == {"modules_to_save": ["norm", "score"]}
    assert fresh_in(torch.nn.Module(), LoraConfig()) == {}


def test_half_a_head_is_no_head():
    model = torch.nn.Module()
    model.score = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"m lacks 1 .*\(score.bias, …\)"):
        mark_fresh("m", model, ["score.bias"])


def test_a_parameter_that_is_of_no_module_is_no_head():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(CheckpointError, match="not those of a head alone"):
        mark_fresh("m", model, ["scale"])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_a_quantised_base_has_dense_heads(name, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = written(name, tmp_path, hidden_size=64, intermediate_size=64)
    base = TASK.load(folder, device="cpu", quantize="nf4")
    kinds = {path: type(m) for path, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    heads = {path for path, kind in kinds.items() if kind is torch.nn.Linear}
    assert heads == {f"{path}{'.dense' * path.endswith('pooler')}" for path in BASES[name][1]}
    assert bitsandbytes.nn.Linear4bit in kinds.values()
    model = attach(base, LoraConfig(target_modules="all-linear"), "a", task_type=TASK.task_type)
    out = model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2, dtype=torch.long))
    out.logits.sum().backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()]
    assert any("modules_to_save.a" in n for n in grads)
