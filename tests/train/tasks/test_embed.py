"""Embeddings: the losses beside sentence-transformers', pooling, and whose negatives are whose."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from multigraft import ConfigError
from multigraft.train.batches import join
from multigraft.train.records import Related
from multigraft.train.tasks import task_of
from multigraft.train.tasks.embed import POOLING, RelatedTokens
from tests.train.tasks.bases import SUBJECTS

PAIRS, SCORED = (s for s in SUBJECTS if s.task == "embed")


class Given:
    """Outputs that are written down."""

    def __init__(self, states):
        self.last_hidden_state = states


def drawn(examples, seed=0, size=6):
    """A batch of these examples and random outputs for it, which want gradients."""
    batch = task_of("embed").collate(examples, 0)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch.rows, batch.width, size)
    states = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    return batch, Given(states)


def examples(count, negatives=0, score=None):
    """Of `count` examples, the first have negatives."""
    return [
        RelatedTokens(
            [10 * n + 1, 7],
            [10 * n + 2, 8, 9],
            [10 * n + 3] if n < negatives else [],
            [] if score is None else [score - n / 10],
        )
        for n in range(count)
    ]


def theirs():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import losses

    return losses


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [0, 4])
def test_the_loss_of_pairs_and_triplets_is_that_of_multiple_negatives_ranking(negatives):
    batch, outputs = drawn(examples(4, negatives))
    task = task_of("embed")
    found = task.losses(outputs, batch).sum() / task.count(batch)
    vectors = task.vectors(outputs, batch)
    columns = [vectors[n :: 3 if negatives else 2] for n in range(3 if negatives else 2)]
    loss = theirs().MultipleNegativesRankingLoss(torch.nn.Identity())
    assert torch.allclose(found, loss.compute_loss_from_embeddings(columns, None), rtol=1e-12)


@pytest.mark.slow
def test_the_loss_of_scored_pairs_is_that_of_their_cosine():
    batch, outputs = drawn(examples(4, score=0.75))
    task = task_of("embed")
    found = task.losses(outputs, batch).sum() / task.count(batch)
    vectors = task.vectors(outputs, batch)
    loss = theirs().CosineSimilarityLoss(torch.nn.Identity())
    labels = torch.tensor([0.75, 0.65, 0.55, 0.45])
    expected = loss.compute_loss_from_embeddings([vectors[::2], vectors[1::2]], labels)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_negatives_are_those_of_the_own_batch_only():
    one, other = drawn(examples(3, 1), 0), drawn(examples(2), 1)
    task = task_of("embed")
    batch = join([one[0], other[0]], 0)
    states = torch.cat([one[1].last_hidden_state, other[1].last_hidden_state])
    alone = torch.cat([task.losses(outputs, batch) for batch, outputs in (one, other)])
    found = task.losses(Given(states), batch)
    assert torch.allclose(found, alone, rtol=1e-12)
    (gradient,) = torch.autograd.grad(found[: one[0].rows].sum(), states)
    assert (gradient[: one[0].rows] != 0).any()
    assert (gradient[one[0].rows :] == 0).all()


def test_pairs_triplets_and_scored_pairs_may_share_a_batch():
    mixed = [*examples(2, 1), *examples(2, score=0.5)]
    batch, outputs = drawn(mixed)
    task = task_of("embed")
    losses = task.losses(outputs, batch)
    anchors = batch.targets["kind"] == 0
    assert (losses[anchors] > 0).all()
    assert (losses[~anchors] == 0).all()
    assert task.count(batch) == 4
    vectors = task.vectors(outputs, batch)
    cosine = float(vectors[5] @ vectors[6])
    assert float(losses[5]) == pytest.approx((cosine - 0.5) ** 2)
    ranked = F.cross_entropy(20 * vectors[0] @ vectors[[1, 2, 4]].T, torch.tensor(0))
    assert float(losses[0]) == pytest.approx(float(ranked))


def test_a_positive_that_comes_twice_is_no_negative_of_itself():
    twice = examples(2)
    twice[1] = RelatedTokens(twice[1].anchor, twice[0].positive, [], [])
    batch, outputs = drawn(twice)
    assert float(task_of("embed").losses(outputs, batch).abs().max()) == pytest.approx(0, abs=1e-12)


def test_padding_changes_no_embedding():
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = {"mean": states[0, :3].mean(0), "cls": states[0, 0], "last": states[0, 2]}
    for name, pool in POOLING.items():
        assert torch.allclose(pool(states, mask)[0], expected[name])
        longer = F.pad(states, (0, 0, 0, 2), value=7.0)
        assert torch.equal(pool(longer, F.pad(mask, (0, 2))), pool(states, mask))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pooling": "mena"}, "'mena'.*Nearest: `mean`"),
        ({"scale": 0}, "`scale`.*above 0"),
        ({"scale": "20"}, "`scale`.*above 0"),
        ({"temperature": 0.05}, "no option `temperature`"),
    ],
)
def test_options_are_checked(options, why):
    with pytest.raises(ConfigError, match=why):
        task_of({"name": "embed", **options})


def test_long_texts_are_cut_each_by_itself(set_up):
    own = set_up(PAIRS)
    record = Related("fine " * 9, "dull", "poor " * 9, None, 1)
    ((example,), is_cut) = own.task.pieces(record, own.tokenizer, 4)
    assert [len(example.anchor), len(example.positive), len(example.negative)] == [4, 3, 4]
    assert is_cut


def test_of_a_model_with_a_decoder_the_encoder_is_taken(folders):
    base = task_of("embed").load(str(folders("t5")))
    assert type(base).__name__ == "T5EncoderModel"


def test_the_nearest_is_sought_among_all_candidates(set_up):
    own = set_up(PAIRS)
    found = own.task.measures(own.base, own.examples[:8], pad=own.pad, batch_size=3)
    whole = own.task.measures(own.base, own.examples[:8], pad=own.pad, batch_size=8)
    assert found == pytest.approx(whole)
    same = [RelatedTokens(e.anchor, e.anchor, e.negative, []) for e in own.examples[:8]]
    found = own.task.measures(own.base, same, pad=own.pad, batch_size=3)
    assert found == {"accuracy_at_1": 1.0}


def test_scores_are_compared_by_rank(set_up):
    own = set_up(SCORED)
    found = own.task.measures(own.base, own.examples, pad=own.pad, batch_size=5)
    with torch.no_grad():
        batch = own.batch(0, len(own.examples))
        vectors = own.task.vectors(own.base(**batch.inputs), batch)
    stats = pytest.importorskip("scipy.stats")
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    expected = stats.spearmanr(cosines, batch.targets["score"][::2]).statistic
    assert found["spearman"] == pytest.approx(expected, abs=1e-6)
