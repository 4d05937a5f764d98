"""Worlds of two and four processes, started when a test first asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def two() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="session")
def four() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()
