"""What holds for every test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples on every machine, however busy it is.
settings.register_profile("multigraft", deadline=None, derandomize=True)
settings.load_profile("multigraft")


def pytest_configure(config: pytest.Config) -> None:
    """One thread in each xdist worker: tiny models gain nothing from more."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
