"""Context adapters are trained by the library's own loop as weight adapters are."""

from __future__ import annotations

import pytest
import torch

import multigraft
from multigraft.train.encode import Encoded
from multigraft.train.evaluate import mean_loss
from multigraft.train.lane import Lane
from multigraft.train.loop import train
from multigraft.train.recipe import Recipe
from tests import oracle
from tests.prompts import pairs


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix", "adaption"])
def test_the_loss_falls_and_is_what_the_file_gives(method, tmp_path):
    source = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 9, (8, 9), generator=source).tolist()  # few of the words there are
    examples = [Encoded(row[: 5 + i % 4], [True] * (5 + i % 4)) for i, row in enumerate(rows)]
    adapted = pairs.ours(method, "llama")
    before = mean_loss(adapted, examples, pad=0)
    losses = train(adapted, Lane(adapted, "default", examples, Recipe(steps=30, lr=0.05), 0))
    after = mean_loss(adapted, examples, pad=0)
    assert len(losses) == 30
    assert after < before - 0.01
    adapted.save_pretrained(tmp_path)
    read = multigraft.PeftModel.from_pretrained(oracle.build(oracle.llama), tmp_path)
    assert mean_loss(read, examples, pad=0) == pytest.approx(after, abs=1e-5)


def test_loss_is_that_of_the_users_tokens():
    adapted = pairs.ours("prompt", "llama")
    ids = oracle.inputs(adapted)["input_ids"]
    examples = [Encoded(row, [True] * len(row)) for row in ids.tolist()]
    expected = adapted(input_ids=ids, labels=ids).loss.detach()
    # The model's own loss also learns the first token, which the last virtual one predicts.
    logits = adapted(input_ids=ids).logits.detach()[:, 3:-1]
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert mean_loss(adapted, examples, pad=0) == pytest.approx(float(own), abs=1e-5)
    assert float(expected) != pytest.approx(float(own), abs=1e-5)
