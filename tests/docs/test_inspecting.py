"""docs/inspecting.md is what its examples print, and names every law."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from multigraft.inspection.checks import CHECKS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_script_prints():
    pytest.importorskip("peft")
    script = runpy.run_path(str(DOCS / "inspecting.py"))
    written = (DOCS / "inspecting.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run: python docs/inspecting.py --write"


def test_every_law_is_described():
    page = (DOCS / "inspecting.md").read_text(encoding="utf-8")
    assert [law for law, _ in CHECKS.items() if f"- **{law}**" not in page] == []
