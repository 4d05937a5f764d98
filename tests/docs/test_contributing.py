"""CONTRIBUTING's table of places names what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_place_in_the_table_exists():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    places = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(places) > 20
    assert [name for name in places if not (ROOT / "src" / "multigraft" / name).exists()] == []


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = [PAGE, (ROOT / "README.md").read_text(encoding="utf-8")]
    named = {name for page in pages for name in re.findall(r"^(?:\S+=\S+ )?make (\w+)", page, re.M)}
    assert {"test", "demo"} <= named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.M)] == []
