"""The rows of docs/prompts.md about PEFT, each tried: what it does, and what we do instead."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import multigraft
from tests import oracle
from tests.prompts import pairs
from tests.prompts.test_padding import LONG, padded

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def load(library, model: str, folder, **more):
    base = oracle.build(pairs.MODELS[model][0])
    with oracle.quiet():
        return library.PeftModel.from_pretrained(base, folder, **more)


def test_a_lora_beside_a_prompt():
    pair = pairs.pair("prompt", "llama")
    with pytest.raises(ValueError, match="Cannot combine adapters"):
        pair.theirs.add_adapter("l", peft.LoraConfig(task_type="CAUSAL_LM"))
    pair.ours.add_adapter("l", multigraft.LoraConfig(task_type="CAUSAL_LM"))
    pair.ours.set_adapter(["default", "l"])
    assert pair.ours.active_adapters == ["default", "l"]


def test_left_padding_in_generate():
    batch, rows = padded("left")
    how = {**GREEDY, "max_new_tokens": 2, "return_dict_in_generate": True, "output_scores": True}
    pair = pairs.pair("prompt", "gpt2")
    gaps = []
    for adapted in (pair.ours, pair.theirs):
        together = adapted.generate(**batch, **how).scores[-1][0]
        alone = adapted.generate(
            input_ids=rows[0], attention_mask=torch.ones_like(rows[0]), **how
        ).scores[-1][0]
        gaps.append(float((together - alone).abs().max()))
    assert gaps[0] < 1e-5 < 1e-2 < gaps[1]


def test_right_padding_of_a_decoder_that_classifies():
    batch, rows = padded("right")
    assert rows[0].shape[1] < LONG
    pair = pairs.pair("prompt", "llama_classifier")
    gaps = []
    for adapted in (pair.ours, pair.theirs):
        alone = adapted(input_ids=rows[0], attention_mask=torch.ones_like(rows[0])).logits
        gaps.append(float((adapted(**batch).logits[0] - alone[0]).detach().abs().max()))
    assert gaps[0] < 1e-6 < 1e-4 < gaps[1]


def test_positions_with_a_prompt():
    pair = pairs.pair("prompt", "llama")
    batch = pairs.unlabelled(pair.batch)
    moved = torch.arange(oracle.TOKENS)[None] + 5
    changes = []
    for adapted in (pair.ours, pair.theirs):
        with oracle.quiet():
            with_them = oracle.output(adapted, batch, position_ids=moved)
        changes.append(not torch.equal(with_them, oracle.output(adapted, batch)))
    assert changes == [True, False]


def test_a_cache_that_is_passed_to_forward():
    pair = pairs.pair("prompt", "llama")
    ids = pair.batch["input_ids"]
    lengths = []
    for adapted in (pair.ours, pair.theirs):
        cache = adapted(input_ids=ids[:, :-1], use_cache=True).past_key_values
        adapted(input_ids=ids[:, -1:], past_key_values=cache)
        lengths.append(cache.get_seq_length())
    assert lengths == [oracle.TOKENS + 3, oracle.TOKENS + 3 + 3]


def test_a_static_cache_in_generate():
    pair = pairs.pair("prompt", "llama")
    batch = pairs.unlabelled(pair.batch)
    how = {**GREEDY, "max_new_tokens": 2, "cache_implementation": "static", "disable_compile": True}
    assert pair.ours.generate(**batch, **how).shape == (3, oracle.TOKENS + 2)
    with pytest.raises((KeyError, IndexError)):  # with a mask, or for want of room
        pair.theirs.generate(**batch, **how)


def test_p_tuning_saved_while_training():
    more = {"encoder_num_layers": 2, "encoder_dropout": 0.9}
    pair = pairs.pair("p_tuning_lstm", "llama", **more)
    same = []
    for library, adapted in ((multigraft, pair.ours), (peft, pair.theirs)):
        state = library.get_peft_model_state_dict
        quiet = state(adapted)["prompt_embeddings"]
        same.append(torch.equal(quiet, state(adapted.train())["prompt_embeddings"]))
    assert same == [True, False]


def test_a_prefix_for_keys_of_another_width():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=6, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    options = pairs.options("prefix", "t5")
    build = lambda: oracle.build(lambda: transformers.T5ForConditionalGeneration(config))  # noqa: E731
    ours = multigraft.get_peft_model(build(), oracle.our_config(options)).eval()
    theirs = peft.get_peft_model(build(), oracle.peft_config(options)).eval()
    batch = oracle.inputs(ours)
    assert oracle.output(ours, batch).isfinite().all()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        theirs(**batch)


def test_a_prompt_for_embeddings_narrower_than_the_layers():
    config = transformers.ElectraConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    options = pairs.options("prompt", "bert_classifier")
    build = lambda: oracle.build(  # noqa: E731
        lambda: transformers.ElectraForSequenceClassification(config)
    )
    ours = multigraft.get_peft_model(build(), oracle.our_config(options)).eval()
    theirs = peft.get_peft_model(build(), oracle.peft_config(options)).eval()
    batch = oracle.inputs(ours)
    assert oracle.output(ours, batch).shape == (3, 2)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        theirs(**batch)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_training_on_from_a_file(method, tmp_path):
    pairs.ours(method, "llama").save_pretrained(tmp_path)
    ours = load(multigraft, "llama", tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in ours.parameters())
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        load(peft, "llama", tmp_path, is_trainable=True)
