"""Scores, beside numbers counted by hand and by scipy."""

from __future__ import annotations

import pytest
import torch

from multigraft.train import scores


def test_macro_f1_is_the_mean_over_classes_that_occur():
    predicted, true = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    # Class 0: 2·1/(2+1); class 1: 2·1/(1+3); class 2: 0; class 3 occurs nowhere.
    assert scores.macro_f1(predicted, true, 4) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores.accuracy(predicted, true) == 0.5


def test_of_nothing_every_score_is_0():
    none = torch.zeros(0)
    assert scores.accuracy(none, none) == 0
    assert scores.macro_f1(none, none, 3) == 0
    assert scores.entity_f1([]) == 0
    assert scores.pearson(none, none) == 0
    assert scores.spearman(torch.ones(3), torch.arange(3)) == 0


def test_correlations_are_scipys_with_ties_too():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 6, (40,), generator=generator).float()
    other = one + torch.randint(0, 6, (40,), generator=generator)
    assert scores.pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic)
    assert scores.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert scores.spearman(one, -one) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-X I-X O", {("X", 1, 3)}),
        ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("B-X I-Y", {("X", 0, 1), ("Y", 1, 2)}),
        ("I-X I-X", {("X", 0, 2)}),
        ("O O", set()),
        ("B-X", {("X", 0, 1)}),
    ],
)
def test_entities_are_whole_runs_of_a_type(tags, found):
    assert scores.entities(tags.split()) == found


def test_entities_count_only_when_they_are_right_as_a_whole():
    true = [["B-X", "I-X", "O", "B-Y"], ["B-X"]]
    guessed = [["B-X", "O", "O", "B-Y"], ["B-X"]]
    assert scores.entity_f1(zip(guessed, true, strict=True)) == pytest.approx(2 * 2 / (3 + 3))


def test_tags_of_entities_are_known_by_their_form():
    assert scores.is_bio(["O", "B-X", "I-X"])
    assert not scores.is_bio(["O"])
    assert not scores.is_bio(["NOUN", "VERB"])
