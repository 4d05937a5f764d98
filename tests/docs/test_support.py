"""docs/support.md says what is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_pairs_is_what_the_script_finds() -> None:
    script = [sys.executable, "docs/support.py"]
    found = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "support.md").read_text()
    assert found.strip() == page.strip(), "run: python docs/support.py --write"
