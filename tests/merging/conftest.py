"""A tiny base model on disk, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_base import write_base


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_base(tmp_path_factory.mktemp("base"))
