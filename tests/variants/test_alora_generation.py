"""aLoRA in generation, against PEFT: caches, beams, prompts in pieces; and where PEFT slides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multigraft import RoutingError
from tests.methods.against_peft import near
from tests.variants.invoked import (
    IDS,
    MASK,
    SPANS,
    base,
    both,
    ours_alone,
)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "anew"])
def test_generation_agrees_with_peft_and_with_itself_without_a_cache(cached: bool) -> None:
    """Without a cache PEFT's active tokens slide along with what is written."""
    ours, theirs = both()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASK}
    expected = theirs.generate(input_ids=IDS, **options)
    assert not torch.equal(expected, base().generate(input_ids=IDS, **options))
    assert torch.equal(ours.generate(IDS, use_cache=cached, **options), expected)


def test_generation_goes_on_from_a_cache_of_the_base() -> None:
    """What aLoRA is for: the base's cache of all that stands before the invocation."""
    ours = ours_alone()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    with torch.no_grad(), ours.disable_adapter():
        cache = ours(ids[:, :3], use_cache=True).past_key_values
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = ours.generate(ids, **options)
    assert torch.equal(ours.generate(ids, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_follow_their_rows(options: dict[str, int]) -> None:
    """PEFT refuses beams."""
    ours = ours_alone()
    rows = [0, 2, 3]
    together = ours.generate(
        IDS[rows], attention_mask=MASK[rows], max_new_tokens=4, do_sample=False, **options
    )
    per_row = options.get("num_return_sequences", 1)
    for place, row in enumerate(rows):
        alone = ours.generate(
            IDS[[row]], attention_mask=MASK[[row]], max_new_tokens=4, do_sample=False, **options
        )
        assert torch.equal(together[place * per_row : (place + 1) * per_row], alone)


def test_a_prompt_may_be_read_in_pieces() -> None:
    ours = ours_alone()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = ours.generate(IDS[:1], **options)
    assert torch.equal(ours.generate(IDS[:1], prefill_chunk_size=3, **options), expected)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}],
    ids=str,
)
def test_every_way_of_generating_writes_the_same(options: dict[str, Any]) -> None:
    ours = ours_alone()
    shared = {"max_new_tokens": 6, "do_sample": False}
    expected = ours.generate(IDS[:1], **shared)
    assert torch.equal(ours.generate(IDS[:1], **shared, **options), expected)


def test_generation_from_embeddings_takes_offsets() -> None:
    ours = ours_alone()
    shared = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    expected = ours.generate(IDS, **shared)[:, IDS.shape[1] :]
    embedded = ours.get_input_embeddings()(IDS).detach()
    found = ours.generate(
        inputs_embeds=embedded, alora_offsets=[s or None for s in SPANS], **shared
    )
    assert torch.equal(found, expected)


def test_a_loop_of_ones_own_says_where_the_adapter_acts() -> None:
    ours = ours_alone()
    whole = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 2, 3, 4, 7, 8]])
    with torch.no_grad():
        expected = ours(whole).logits[:, -1]
        cache = ours(whole[:, :-1], use_cache=True).past_key_values
        with pytest.raises(RoutingError, match=r"goes on from a cache.*`alora_offsets`"):
            ours(whole[:, -1:], past_key_values=cache)
        found = ours(whole[:, -1:], past_key_values=cache, alora_offsets=[5, None]).logits
    near(found[:, -1], expected)


def test_deleting_it_leaves_no_hook_behind() -> None:
    ours = ours_alone()
    ours.generate(IDS, max_new_tokens=2)
    assert not ours.get_base_model()._forward_pre_hooks
    ours.delete_adapter("default")
    assert torch.equal(ours(IDS).logits, base()(IDS).logits)
