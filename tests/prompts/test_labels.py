"""Losses that PEFT gets wrong: labels and positions move with the user's own tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests import oracle
from tests.prompts import pairs

LENGTH = 3


@pytest.mark.parametrize("method", pairs.TOKENS)
def test_virtual_tokens_have_no_label_in_tagging(method):
    pair = pairs.pair(method, "bert_tagger")
    given = pair.ours(**pair.batch)
    own = given.logits[:, LENGTH:]
    expected = cross_entropy(own.flatten(0, 1), pair.batch["labels"].flatten())
    torch.testing.assert_close(given.loss, expected)
    with pytest.raises(ValueError, match="batch_size"):
        pair.theirs(**pair.batch)


@pytest.mark.parametrize("method", pairs.TOKENS)
def test_a_readers_positions_count_the_virtual_tokens(method):
    pair = pairs.pair(method, "bert_reader")
    given = pair.ours(**pair.batch)
    starts = cross_entropy(given.start_logits, pair.batch["start_positions"] + LENGTH)
    ends = cross_entropy(given.end_logits, pair.batch["end_positions"] + LENGTH)
    torch.testing.assert_close(given.loss, (starts + ends) / 2)
    assert not torch.allclose(given.loss, pair.theirs(**pair.batch).loss)


@pytest.mark.parametrize("method", ["prefix", "projected_prefix"])
def test_a_prefix_moves_no_position(method):
    pair = pairs.pair(method, "bert_reader")
    given = pair.ours(**pair.batch)
    assert given.start_logits.shape == pair.batch["input_ids"].shape
    torch.testing.assert_close(given.loss, pair.theirs(**pair.batch).loss)


def test_padding_that_has_no_label_stays_without_one():
    pair = pairs.pair("prompt", "llama")
    pair.batch["labels"][:, :2] = -100
    torch.testing.assert_close(pair.ours(**pair.batch).loss, pair.theirs(**pair.batch).loss)


def test_token_types_of_virtual_tokens_are_zero():
    adapted = pairs.ours("prompt", "bert_encoder")
    batch = oracle.inputs(adapted)
    usual = oracle.output(adapted, batch)
    types = torch.zeros_like(batch["input_ids"])
    torch.testing.assert_close(oracle.output(adapted, batch, token_type_ids=types), usual)
    other = oracle.output(adapted, batch, token_type_ids=types + 1)
    assert not torch.allclose(other, usual, atol=1e-2)
    pair = pairs.pair("prompt", "bert_classifier")
    pair.batch["token_type_ids"] = types + 1
    pair.assert_equal()


def test_embedded_input_and_positional_arguments_are_the_same_call():
    adapted = pairs.ours("prompt", "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    usual = adapted(input_ids=ids).logits
    embedded = adapted.word_embeddings(ids)
    torch.testing.assert_close(adapted(inputs_embeds=embedded).logits, usual)
    torch.testing.assert_close(adapted(ids, torch.ones_like(ids)).logits, usual)


def test_a_regression_target_per_row_is_no_label_per_token():
    adapted = pairs.ours("prompt", "bert_classifier")
    adapted.get_base_model().config.problem_type = "multi_label_classification"
    batch = oracle.inputs(adapted, rows=2)
    batch = {"input_ids": batch["input_ids"][:, :3]}  # as many tokens as labels
    loss = adapted(**batch, labels=torch.ones(2, 3)).loss
    assert torch.isfinite(loss)
