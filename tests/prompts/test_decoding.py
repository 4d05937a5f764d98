"""Decoding by hand, by generate, and from caches of every kind gives the same tokens."""

from __future__ import annotations

import pytest
import torch
import transformers

import multigraft
from tests import oracle
from tests.prompts import pairs

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix", "adaption"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_that_a_call_filled_goes_on(method, model, masked):
    adapted = pairs.ours(method, model)
    ids = oracle.inputs(adapted)["input_ids"]
    mask = torch.ones_like(ids) if masked else None
    at_once = adapted(input_ids=ids, attention_mask=mask).logits
    first = adapted(
        input_ids=ids[:, :5], attention_mask=mask[:, :5] if masked else None, use_cache=True
    )
    rest = adapted(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, at_once[:, -3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_empty_cache_of_the_users_is_filled(method):
    adapted = pairs.ours(method, "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    cache = transformers.DynamicCache()
    given = adapted(input_ids=ids, past_key_values=cache)
    assert given.past_key_values is cache
    assert cache.get_seq_length() == oracle.TOKENS + 3
    torch.testing.assert_close(given.logits, adapted(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_static_cache_gives_the_same_tokens(method, model):
    adapted = pairs.ours(method, model)
    batch = oracle.inputs(adapted)
    usual = adapted.generate(**batch, max_new_tokens=6, **GREEDY)
    static = adapted.generate(
        **batch, max_new_tokens=6, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(static, usual)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_returned_sequences_and_beams_are_rows_of_their_own(method):
    adapted = pairs.ours(method, "llama")
    batch = oracle.inputs(adapted, rows=2)
    beams = adapted.generate(
        **batch, max_new_tokens=4, num_beams=4, num_return_sequences=3, **GREEDY
    )
    assert beams.shape == (6, oracle.TOKENS + 4)
    one = adapted.generate(
        input_ids=batch["input_ids"][1:], max_new_tokens=4, num_beams=4, num_return_sequences=3,
        **GREEDY,
    )  # fmt: skip
    assert torch.equal(beams[3:], one)
    config = transformers.GenerationConfig(
        max_new_tokens=4, num_beams=4, num_return_sequences=3, do_sample=False, pad_token_id=0
    )
    config.eos_token_id = None
    by_config = adapted.generate(batch["input_ids"], config, eos_token_id=None)
    assert torch.equal(by_config, beams)


@pytest.mark.parametrize("method", ["prompt", "prefix", "adaption"])
def test_bounds_on_the_length_count_ids(method):
    adapted = pairs.ours(method, "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    given = {"input_ids": ids, **GREEDY}
    assert adapted.generate(**given, max_length=11).shape == (3, 11)
    config = transformers.GenerationConfig(max_length=10, do_sample=False, pad_token_id=0)
    assert adapted.generate(ids, config).shape[1] <= 10
    assert config.max_length == 10 and config.max_new_tokens is None
    adapted.get_base_model().generation_config.max_length = 9
    assert adapted.generate(ids, **GREEDY).shape == (3, 9)


def test_min_length_counts_ids():
    adapted = pairs.ours("prompt", "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    free = adapted.generate(ids, max_new_tokens=6, **GREEDY)
    stop = int(free[0, oracle.TOKENS + 1])  # what the first row says second
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": stop}
    short = adapted.generate(ids[:1], **how)
    long = adapted.generate(ids[:1], min_length=oracle.TOKENS + 4, **how)
    assert short.shape[1] < oracle.TOKENS + 4 <= long.shape[1]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generate_refuses_a_filled_cache(method):
    adapted = pairs.ours(method, "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    cache = adapted(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(multigraft.StateError, match="filled cache"):
        adapted.generate(ids, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_mask_of_another_shape_is_refused(method):
    adapted = pairs.ours(method, "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    mask = torch.zeros(3, 1, oracle.TOKENS, oracle.TOKENS)
    with pytest.raises(multigraft.UnsupportedError, match=r"`attention_mask` \(\(3, 1, 8, 8\)\)"):
        adapted(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_call_without_input_is_refused(method):
    adapted = pairs.ours(method, "llama")
    with pytest.raises(multigraft.UnsupportedError, match="neither `input_ids` nor"):
        adapted(attention_mask=torch.ones(1, 2))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_encoder_that_has_run_is_not_run_again(method):
    adapted = pairs.ours(method, "t5")
    batch = oracle.inputs(adapted)
    mask = torch.ones_like(batch["input_ids"])
    whole = adapted(**batch, attention_mask=mask)
    again = adapted(
        encoder_outputs=(whole.encoder_last_hidden_state,),
        attention_mask=mask,
        decoder_input_ids=batch["decoder_input_ids"],
    )
    torch.testing.assert_close(again.logits, whole.logits)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_positions_count_the_users_tokens_after_a_cache_too(method):
    adapted = pairs.ours(method, "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    positions = torch.arange(oracle.TOKENS)[None]
    at_once = adapted(input_ids=ids).logits
    first = adapted(input_ids=ids[:, :5], position_ids=positions[:, :5], use_cache=True)
    rest = adapted(
        input_ids=ids[:, 5:], position_ids=positions[:, 5:], past_key_values=first.past_key_values
    )
    torch.testing.assert_close(rest.logits, at_once[:, -3:], atol=1e-5, rtol=1e-4)
