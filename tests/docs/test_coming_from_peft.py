"""docs/coming-from-peft.md: every row is what either library does, and every row is tried."""

from __future__ import annotations

from pathlib import Path

import pytest

import multigraft
from tests.docs.comparison import ROWS, Raises, Row, quiet, topics

peft = pytest.importorskip("peft")

# Each fills ROWS, in the page's order.
from tests.docs import rows_structure  # noqa: E402, F401, I001
from tests.docs import rows_state  # noqa: E402, F401
from tests.docs import rows_combine  # noqa: E402, F401
from tests.docs import rows_arithmetic  # noqa: E402, F401
from tests.docs import rows_variants  # noqa: E402, F401
from tests.docs import rows_initialisations  # noqa: E402, F401
from tests.docs import rows_files  # noqa: E402, F401

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from-peft.md"


@pytest.mark.parametrize("library", ["peft", "multigraft"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.topic)
def test_a_row_is_true(row: Row, library: str, tmp_path: Path):
    expected = row.peft if library == "peft" else row.ours
    with quiet():
        try:
            found = row.find(peft if library == "peft" else multigraft, tmp_path)
        except Exception as error:
            if isinstance(expected, Raises) and expected.covers(error):
                return
            raise
    assert found == expected


def test_the_page_has_these_rows_and_no_others():
    assert topics(PAGE) == [row.topic for row in ROWS]
