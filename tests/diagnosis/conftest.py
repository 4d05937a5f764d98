"""A good adapter to bend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.diagnosis.files import CONFIG, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of `CONFIG`."""
    return write(tmp_path / "adapter", CONFIG)
