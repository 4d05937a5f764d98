"""The examples of docs/adding-a-method.md pass the contract suite as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from multigraft.bases import GEOMETRIES
from multigraft.config import CONFIGS
from multigraft.methods import METHODS
from multigraft.storage import STORAGES
from tests.contracts import pairs as suite
from tests.contracts.laws import (
    LAWS,
    Law,
    is_refused,
    is_supported,
    refusal_leaves_the_model_untouched,
)
from tests.contracts.pairs import Pair
from tests.storage.cases import CASES, Case

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore")


def load(name: str) -> ModuleType:
    """The example, run as a user's own module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def registered() -> Iterator[None]:
    """Both examples, for the length of the block: no other test shall see them."""
    load("lora_xs")
    layer: Any = load("row_int8").RowInt8Linear
    CASES["row-int8"] = Case(layer, 0.01)
    try:
        yield
    finally:
        del CASES["row-int8"]
        METHODS.unregister("LORA_XS"), CONFIGS.unregister("LORA_XS")
        GEOMETRIES.unregister(layer), STORAGES.unregister(layer)


with registered():
    METHOD = list(suite.pairs("LORA_XS"))
    METHODS.unregister("LORA_XS")
    STORAGE = [Pair(m, "linear", "row-int8", options) for m, options in suite.rows()]


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """The examples at work."""
    with registered():
        yield


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("pair", [*METHOD, *STORAGE], ids=str)
def test_law(law: Law, pair: Pair) -> None:
    if is_refused(pair):
        refusal_leaves_the_model_untouched(pair)
    elif is_supported(pair) and law.applies(pair):
        law(pair)


def test_the_method_acts_and_learns() -> None:
    pair = METHOD[0]
    assert is_supported(pair)
    dense = [p for p in METHOD if p.storage == "float32"]
    assert {p.geometry for p in dense if is_supported(p)} >= {"linear", "conv1d_transposed"}


def test_the_storage_takes_every_method_but_a_copy() -> None:
    # Quantised modules cannot be copied and trained; LoftQ is there to quantise what is not yet.
    refused = [p for p in STORAGE if is_refused(p)]
    starts = [p for p in refused if p.options.get("init_lora_weights") == "loftq"]
    assert len(starts) == 1
    assert {p.method for p in refused if p not in starts} == {"SAVED_MODULE", "LN_TUNING"}


@pytest.mark.parametrize("name", ["lora_xs", "row_int8"])
def test_an_example_is_one_short_file(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
