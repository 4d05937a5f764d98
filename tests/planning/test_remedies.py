"""What is proposed when a step does not fit does save what is said."""

from __future__ import annotations

import re

import pytest

from multigraft import LoraConfig
from multigraft.planning import Request, advice, out_of_memory, plan, planned, remedies, text

transformers = pytest.importorskip("transformers")

ALL = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def config():
    return transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=96,
    )


@pytest.fixture(scope="module")
def too_large(config):
    return plan(config, ALL, batch_size=16, max_length=512, device="cpu", memory="160MiB")


def test_each_remedy_saves_what_a_plan_with_it_saves(too_large):
    found = remedies(too_large)
    names = [remedy.change[0] for remedy in found]
    assert {"batch_size", "gradient_checkpointing", "max_length"} <= set(names)
    for remedy in found:
        other = planned(too_large.request.but(**dict([remedy.change])))
        assert remedy.saved == too_large.total - other.total > 0
        assert remedy.fits == other.fits


def test_those_that_suffice_come_first(too_large):
    fits = [remedy.fits for remedy in remedies(too_large)]
    assert fits[0] and not fits[-1]
    assert fits == sorted(fits, reverse=True)


def test_a_smaller_batch_is_the_largest_that_fits_with_as_many_parts_as_make_up_for_it(too_large):
    batch = next(r for r in remedies(too_large) if r.change[0] == "batch_size")
    assert batch.change[1] == too_large.largest_batch
    parts = int(re.search(r"`accumulate: (\d+)`", batch.price)[1])
    assert parts * too_large.largest_batch >= 16 > (parts - 1) * too_large.largest_batch


def test_the_message_says_what_to_lower_and_by_how_much(too_large):
    message = advice(too_large)
    assert "`batch_size` 16 and `max_length` 512 takes about" in message
    assert "of 160 MiB" in message
    assert f"`batch_size: {too_large.largest_batch}` saves" in message
    assert "not enough" not in message  # those that suffice are there


def test_where_none_suffices_alone_the_message_says_so(config):
    found = plan(config, ALL, batch_size=16, max_length=512, device="cpu", memory="8MiB")
    assert "None of them suffices alone; combine them." in advice(found)


def test_out_of_memory_is_answered_even_where_no_plan_can_be_made(config):
    options = {"batch_size": 4, "max_length": 64}
    assert "takes about" in out_of_memory(Request(config, {"a": ALL}, **options))
    unknown = Request(config, {"a": LoraConfig(target_modules=["nothing"])}, **options)
    assert "Lower `batch_size` (=4)" in out_of_memory(unknown)


def test_the_text_has_every_part_and_every_remedy(too_large):
    found = remedies(too_large)
    shown = text(too_large, found)
    for part in too_large.parts:
        assert part in shown
    assert f"largest batch that fits: {too_large.largest_batch} rows" in shown
    assert all(str(remedy) in shown for remedy in found)
