"""The largest batch that fits: the next row would not."""

from __future__ import annotations

import pytest

from multigraft import LoraConfig
from multigraft.planning import plan
from multigraft.planning.batch import largest_batch

transformers = pytest.importorskip("transformers")

ALL = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def config():
    return transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_one_more_row_would_not_fit(config, batch_size, checkpointing):
    def planned(rows, memory="4MiB"):
        options = {"max_length": 16, "device": "cpu", "gradient_checkpointing": checkpointing}
        return plan(config, ALL, batch_size=rows, memory=memory, **options)

    largest = planned(batch_size).largest_batch
    assert largest > 4
    assert planned(largest).fits
    assert not planned(largest + 1).fits


def test_a_step_on_a_gpu_leaves_room_for_what_is_not_tensors(config):
    def planned(rows):
        return plan(config, ALL, batch_size=rows, max_length=512, memory="1GiB")

    largest = planned(2).largest_batch
    assert planned(largest).fits
    assert not planned(largest + 1).fits
    assert planned(largest).peak < 1 << 30 < planned(largest + 1).total


def test_a_base_that_does_not_fit_leaves_no_row(config):
    found = plan(config, ALL, max_length=16, memory="100KiB", device="cpu")
    assert found.largest_batch == 0
    assert found.fits is False


def test_without_any_memory_stated_nothing_is_said_to_fit(config):
    found = plan(config, ALL, max_length=16, device="cpu")
    assert found.fits is None
    assert found.largest_batch is None


class Stepped:
    """A step whose events are as many as its rows, so that two of them don't match."""

    def __init__(self, rows: int) -> None:
        self.events = [(n, 10) for n in range(rows)]
        self.course = [10 * (n + 1) for n in range(rows)]
        self.peak = 10 * rows


def test_steps_that_do_not_match_event_by_event_are_searched():
    assert largest_batch(Stepped, 1234, 3) == 123
    assert largest_batch(Stepped, 9, 3) == 0
