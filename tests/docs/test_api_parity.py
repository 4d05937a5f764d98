"""docs/api-parity.md is what the script finds, and nothing is absent without a reason."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    pytest.importorskip("peft")
    return runpy.run_path(str(DOCS / "api_parity.py"))


def test_the_page_is_what_the_script_finds(script) -> None:
    written = (DOCS / "api-parity.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run: python docs/api_parity.py --write"


def test_every_absent_name_has_a_reason(script) -> None:
    assert [name for name, reason in script["absent"]().items() if not reason] == []


def test_every_difference_has_a_reason(script) -> None:
    peft, ours = script["peft"], script["multigraft"]
    for name in set(peft.__all__) & set(ours.__all__):
        assert [part for part, why in script["differences"](name).items() if not why] == [], name


def test_no_reason_is_left_for_what_is_here(script) -> None:
    peft, ours = script["peft"], script["multigraft"]
    both = set(peft.__all__) & set(ours.__all__)
    used = {part for name in both for part in script["differences"](name)}
    assert set(script["reasons"].PARTS) <= used
    assert set(script["reasons"].NAMES) <= set(script["absent"]())
