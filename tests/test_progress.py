"""A bar where tqdm is installed, a word where it is not."""

from __future__ import annotations

import sys

import pytest

from multigraft import MultigraftWarning
from multigraft.progress import shown


def test_items_come_in_order_with_a_bar_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(shown([1, 2, 3], "Counting", False)) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    assert list(shown([1, 2, 3], "Counting")) == [1, 2, 3]
    assert "Counting" in capsys.readouterr().err


def test_without_tqdm_there_is_no_bar_and_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.warns(MultigraftWarning, match="pip install tqdm"):
        assert list(shown([1, 2], "Counting")) == [1, 2]
