"""Evaluation: greedy answers, exact match, and the mean loss over learned tokens."""

from __future__ import annotations

import pytest
import torch

from multigraft import LoraConfig
from multigraft.train import (
    Answer,
    Pair,
    answer,
    attach,
    encode,
    load_model,
    load_tokenizer,
    mean_loss,
    prompt_ids,
    share_right,
)
from multigraft.train.encode import IGNORED
from tests.tiny_base import records


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture
def model(base_dir):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = load_model(base_dir)
    for name in ("a", "b"):
        model = attach(model, config, name, seed=len(name) + ord(name))
    return model


def greedy(model, ids: list[int], count: int, end: int = 0) -> list[int]:
    """Token by token, without a cache or a batch."""
    written: list[int] = []
    model.eval()
    with torch.no_grad():
        while len(written) < count and end not in written:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return [token for token in written if token != end]


def test_answers_are_greedy_and_in_the_records_order(model, tokenizer):
    asked = [*records()[:4], Pair("a much longer prompt than the others are\n", "x")]
    given = answer(model, tokenizer, asked, max_new_tokens=5, batch_size=2)
    assert [a.record for a in given] == asked
    for one in given:
        ids = greedy(model, prompt_ids(one.record, tokenizer), 5)
        assert one.given == tokenizer.decode(ids, skip_special_tokens=True)


def test_rows_of_different_adapters_share_a_batch(model, tokenizer):
    names = ["a", "b", "__base__", "b"]
    mixed = answer(model, tokenizer, records()[:4], adapter_names=names, max_new_tokens=5)
    for name, one in zip(names, mixed, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                (alone,) = answer(model, tokenizer, [one.record], max_new_tokens=5)
        else:
            model.set_adapter(name)
            (alone,) = answer(model, tokenizer, [one.record], max_new_tokens=5)
        assert one.given == alone.given
    assert len({one.given for one in mixed}) > 1


def test_an_answer_is_right_when_equal_but_for_space_around_it():
    record = Pair("p", "c d")
    answers = [Answer(record, "c d", given) for given in ("c d", " c d\n", "c  d", "")]
    assert [a.is_right for a in answers] == [True, True, False, False]
    assert share_right(answers) == 0.5
    assert share_right([]) == 0.0


def test_the_mean_loss_counts_every_learned_token_once_whatever_the_batches(model, tokenizer):
    examples = encode(records(), tokenizer, 64).examples
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for one in examples:
            logits = model(torch.tensor([one.ids])).logits[0, :-1]
            labels = torch.tensor(one.labels)[1:]
            loss = torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=IGNORED, reduction="sum"
            )
            total, count = total + float(loss), count + int((labels >= 0).sum())
    for size in (1, 5, 64):
        assert mean_loss(model, examples, batch_size=size) == pytest.approx(total / count, rel=1e-5)


def test_evaluation_leaves_the_mode_as_it_was(model, tokenizer):
    for mode in (True, False):
        model.train(mode)
        answer(model, tokenizer, records()[:1], max_new_tokens=1)
        mean_loss(model, encode(records()[:1], tokenizer, 64).examples)
        assert model.training is mode
