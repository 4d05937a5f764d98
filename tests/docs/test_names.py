"""docs/names.md is what the script finds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_names_is_what_the_script_finds():
    pytest.importorskip("peft")
    script = runpy.run_path(str(DOCS / "names.py"))
    written = (DOCS / "names.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run: python docs/names.py --write"
