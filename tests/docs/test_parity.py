"""docs/parity.md: a row for every option of PEFT's LoRA, and a test that is there in every row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def parity() -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        import parity as module
    finally:
        sys.path.remove(str(DOCS))
    return module


def test_every_option_of_peft_has_a_row_and_no_row_is_of_nothing(parity: Any) -> None:
    tables = parity.tables()
    for title, options in parity.options().items():
        assert tables[title].keys() == options, title
    assert parity.inner_configs() == parity.rows.OPTIONS.keys()


def test_the_names_of_what_is_done_are_pefts(parity: Any) -> None:
    """Of a function, a method, an argument or a class; each is in PEFT's source somewhere."""
    import peft

    root = Path(peft.__file__).parent
    source = "\n".join(p.read_text(encoding="utf-8") for p in root.rglob("*.py"))
    for title in ("What is done with adapters", "Values of `combination_type`"):
        for option in parity.tables()[title]:
            for name in option.split(" (")[0].split(", "):
                assert name in source, name


def test_no_row_is_empty(parity: Any) -> None:
    empty = [
        (t, o) for t, table in parity.tables().items() for o, tests in table.items() if not tests
    ]
    assert empty == []


def test_every_test_that_is_named_is_there(parity: Any) -> None:
    named = {test for t in parity.tables().values() for tests in t.values() for test in tests}
    assert len(named) > 50
    assert [test for test in sorted(named) if not parity.is_there(test)] == []
    assert not parity.is_there("test_helpers.py::test_that_is_not_there")


def test_the_page_is_up_to_date(parity: Any) -> None:
    written = (DOCS / "parity.md").read_text(encoding="utf-8")
    assert written == parity.page(), "run: python docs/parity.py --write"
