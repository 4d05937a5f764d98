"""Padding changes nothing: each row gives what it gives alone, wherever its padding stands."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

import multigraft
from tests import oracle
from tests.prompts import pairs

SHORT, LONG = 4, 7


def padded(side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A batch of a short row and a long one, padded on this side, and both rows as they are."""
    source = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 40, (1, n), generator=source) for n in (SHORT, LONG)]
    ids = torch.zeros(2, LONG, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(LONG - row.shape[1], LONG) if side == "left" else slice(0, row.shape[1])
        ids[index, where], mask[index, where] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}, rows


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix", "adaption"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("says_mask", [True, False])
def test_left_padding_changes_no_generated_token(method, model, says_mask):
    adapted = pairs.ours(method, model)
    batch, rows = padded("left")
    if not says_mask:
        batch.pop("attention_mask")  # which generate then infers
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_scores": True}
    how |= {"return_dict_in_generate": True, "pad_token_id": 0}
    together = adapted.generate(**batch, **how)
    for index, row in enumerate(rows):
        alone = adapted.generate(row, **how)
        new = together.sequences[index, LONG:]
        assert torch.equal(new, alone.sequences[0, row.shape[1] :])
        for mine, own in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(mine[index], own[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "kind", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"]
)
def test_a_classifier_sees_the_last_token_that_is_no_padding(method, side, kind):
    batch, rows = padded(side)
    adapted = _classifier(kind, method)
    if side == "left":  # so that tokens, and not padding, are counted
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = adapted(**batch).logits
    for index, row in enumerate(rows):
        alone = adapted(input_ids=row, attention_mask=torch.ones_like(row)).logits
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("model", ["bert_classifier", "bert_encoder"])
def test_an_encoder_pays_padding_no_attention(method, model):
    adapted = pairs.ours(method, model)
    batch, rows = padded("right")
    together = oracle.output(adapted, batch)
    for index, row in enumerate(rows):
        alone = oracle.output(adapted, {"input_ids": row})
        own = together[index, : alone.shape[1]] if alone.dim() == 3 else together[index]
        torch.testing.assert_close(own, alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_encoder_decoder_generates_the_same_from_a_padded_row(method):
    adapted = pairs.ours(method, "t5")
    batch, rows = padded("right")
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for given in (batch, {"input_ids": batch["input_ids"]}):
        together = adapted.generate(**given, **how)
        for index, row in enumerate(rows):
            assert torch.equal(together[index], adapted.generate(input_ids=row, **how)[0])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_positions_count_the_users_tokens(method, model):
    adapted = pairs.ours(method, model)
    batch = oracle.inputs(adapted)
    usual = adapted(**batch).logits
    positions = torch.arange(oracle.TOKENS)[None]
    torch.testing.assert_close(adapted(**batch, position_ids=positions).logits, usual)
    shifted = adapted(**batch, position_ids=positions + 2).logits
    assert not torch.allclose(shifted, usual, atol=1e-4)


def _classifier(kind: str, method: str):
    config = (
        oracle.llama_classifier().config
        if kind.startswith("Llama")
        else transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0
        )
    )
    config.num_labels = 3
    base = oracle.build(lambda: getattr(transformers, kind)(config))
    options = {**pairs.METHODS[method], "task_type": "SEQ_CLS"}
    return multigraft.get_peft_model(base, oracle.our_config(options)).eval()
