"""Warnings of torch that are not under test."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor")
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        yield
