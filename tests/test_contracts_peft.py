"""PEFT as the oracle of the contract suite: agreement wherever it supports a pair too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from tests.contracts.laws import is_supported
from tests.contracts.oracle import AGREEMENTS, Agreement, defect, support
from tests.contracts.pairs import Pair, pairs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SHARED = [pair for pair in pairs() if is_supported(pair) and support(pair).adapts]

pytestmark = pytest.mark.filterwarnings("ignore")


def cases() -> Iterator[object]:
    """Every agreement on every shared pair; where PEFT has a known defect, the law must fail."""
    for law in AGREEMENTS:
        for pair in SHARED:
            if law.applies(pair):
                why = defect(law, pair)
                marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
                yield pytest.param(law, pair, marks=marks, id=f"{law}-{pair}")


@pytest.mark.parametrize(("law", "pair"), list(cases()))
def test_agreement(law: Agreement, pair: Pair) -> None:
    law(pair)
