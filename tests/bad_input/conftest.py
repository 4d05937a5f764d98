"""A good checkpoint to damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from multigraft import get_peft_model
from tests.bad_input.loading import CONFIG
from tests.weaknesses import nets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of `CONFIG`."""
    model = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(model, "default", seed=3)
    model.save_pretrained(tmp_path / "good")
    return tmp_path / "good"
