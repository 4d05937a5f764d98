"""docs/seeing.md is what its examples print."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_script_prints():
    pytest.importorskip("transformers")
    script = runpy.run_path(str(DOCS / "seeing.py"))
    written = (DOCS / "seeing.md").read_text(encoding="utf-8")
    assert written == script["page"](), "run: python docs/seeing.py --write"
