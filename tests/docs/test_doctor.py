"""docs/doctor.md is what its examples print, and names every check."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from multigraft.diagnosis.checks import CHECKS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_script_prints():
    pytest.importorskip("peft")
    script = runpy.run_path(str(DOCS / "doctor.py"))
    written = (DOCS / "doctor.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run: python docs/doctor.py --write"


def test_every_check_is_described():
    page = (DOCS / "doctor.md").read_text(encoding="utf-8")
    assert [name for name, _ in CHECKS.items() if f"**{name}**" not in page] == []
