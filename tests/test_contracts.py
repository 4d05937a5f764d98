"""The contract suite: every law on every pair of method, geometry and storage.

A new method, geometry or storage is tested by existing. `tests.contracts.laws` states the laws,
`tests.contracts.pairs` builds what they run on.
"""

from __future__ import annotations

import warnings

import pytest

from tests.contracts.laws import (
    LAWS,
    Law,
    is_refused,
    is_supported,
    refusal_leaves_the_model_untouched,
)
from tests.contracts.pairs import Pair, pairs, uncovered

ALL = list(pairs())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SUPPORTED = [pair for pair in ALL if is_supported(pair)]
    REFUSED = [pair for pair in ALL if is_refused(pair)]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("law", "pair"),
    [(law, pair) for law in LAWS for pair in SUPPORTED if law.applies(pair)],
    ids=str,
)
def test_law(law: Law, pair: Pair) -> None:
    law(pair)


@pytest.mark.parametrize("pair", REFUSED, ids=str)
def test_a_pair_that_is_refused_leaves_the_model_untouched(pair: Pair) -> None:
    refusal_leaves_the_model_untouched(pair)


def test_every_registered_geometry_has_a_case() -> None:
    assert not uncovered()


def test_every_method_acts_on_a_layer() -> None:
    acting = {pair.method for pair in SUPPORTED}
    assert acting == {pair.method for pair in ALL}
