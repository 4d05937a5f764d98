"""T21: merging into one of two modules that share a weight changes that one alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import (
    LoraConfig,
    MergeError,
    MultigraftWarning,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    UnsupportedError,
)
from tests import oracle
from tests.laws import fingerprint
from tests.oracle import build

IDS = torch.tensor([[3, 4, 9, 7, 3]])
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def tied() -> nn.Module:
    """A tiny model whose head shares the embedding's weight."""
    return build(lambda: oracle.llama(tie_word_embeddings=True))


def lora(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False, **more)


def adapted(**configs: PeftConfig) -> PeftModel:
    """A tied model with these adapters, all active."""
    (first, config), *others = configs.items()
    model = multigraft.get_peft_model(tied(), config, first)
    for name, more in others:
        model.add_adapter(name, more)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    model.set_adapter(list(configs))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MultigraftWarning)
        yield


CASES: dict[str, dict[str, PeftConfig]] = {
    "embedding": {"a": lora("embed_tokens")},
    "head": {"a": lora("lm_head")},
    "both": {"a": lora("embed_tokens", "lm_head")},
    "one each": {"a": lora("lm_head"), "b": lora("embed_tokens")},
    "DoRA": {"a": lora("lm_head", use_dora=True)},
    "trained tokens": {"a": TrainableTokensConfig(token_indices=[3, 9])},
    "tokens of the head": {"a": lora("q_proj", trainable_token_indices={"lm_head": [3]})},
    "tokens beside LoRA": {"a": lora("embed_tokens", trainable_token_indices=[3, 9])},
    "LoRA and tokens": {"a": lora("lm_head"), "b": TrainableTokensConfig(token_indices=[3, 9])},
    "saved head": {"a": lora("q_proj", modules_to_save=["lm_head"])},
    "saved embedding": {"a": lora("lm_head", modules_to_save=["embed_tokens"])},
}


@pytest.mark.parametrize("configs", CASES.values(), ids=CASES)
def test_t21_merging_computes_what_the_adapters_compute(configs: dict[str, PeftConfig]) -> None:
    model = adapted(**configs)
    before = logits(model)
    model.merge_adapter(list(configs))
    torch.testing.assert_close(logits(model), before, **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, **CLOSE)


@pytest.mark.parametrize("configs", CASES.values(), ids=CASES)
def test_t21_unmerging_ties_them_again(configs: dict[str, PeftConfig]) -> None:
    model = adapted(**configs)
    graph = fingerprint(model.get_base_model())
    before = logits(model)
    model.merge_adapter(list(configs))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tied()), **CLOSE)
    model.unmerge_adapter()
    assert fingerprint(model.get_base_model()) == graph
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_t21_two_are_merged_and_unmerged_in_any_order(order: list[str]) -> None:
    model = adapted(a=lora("lm_head"), b=lora("embed_tokens"))
    graph, before = fingerprint(model.get_base_model()), logits(model)
    for name in order:
        model.merge_adapter([name])
        torch.testing.assert_close(logits(model), before, **CLOSE)
    for name in order:
        model.unmerge_adapter([name])
        torch.testing.assert_close(logits(model), before, **CLOSE)
    assert fingerprint(model.get_base_model()) == graph


def test_t21_subtracting_ties_them_again_too() -> None:
    model = adapted(a=lora("embed_tokens"))
    graph = fingerprint(model.get_base_model())
    model.base_model.merge_adapter(keep_original=False)
    model.unmerge_adapter()
    assert fingerprint(model.get_base_model()) == graph


def test_t21_trained_tokens_after_a_lora_are_merged_at_both_places() -> None:
    model = adapted(a=lora("embed_tokens"), b=TrainableTokensConfig(token_indices=[3, 9]))
    graph, before = fingerprint(model.get_base_model()), logits(model)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), before, **CLOSE)
    model.unmerge_adapter(["a"])
    torch.testing.assert_close(logits(model), before, **CLOSE)
    model.unmerge_adapter(["b"])
    assert fingerprint(model.get_base_model()) == graph


def test_t21_a_lora_after_trained_tokens_is_refused_and_changes_nothing() -> None:
    model = adapted(a=lora("embed_tokens"), b=TrainableTokensConfig(token_indices=[3, 9]))
    before = logits(model)
    model.merge_adapter(["b"])
    graph = fingerprint(model.get_base_model())
    with pytest.raises(UnsupportedError, match="merge all of them in one call"):
        model.merge_adapter(["a"])
    assert fingerprint(model.get_base_model()) == graph
    torch.testing.assert_close(logits(model), before, **CLOSE)


def test_t21_a_merge_that_fails_leaves_them_tied() -> None:
    model = adapted(a=lora("embed_tokens", "q_proj"))
    graph = fingerprint(model.get_base_model())
    with torch.no_grad():
        model.get_parameter(
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.a.weight"
        ).fill_(3e38)
        model.get_parameter(
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.a.weight"
        ).fill_(3e38)
    with pytest.raises(MergeError):
        model.merge_adapter(safe_merge=True)
    after = fingerprint(model.get_base_model())
    assert after.modules == graph.modules
    assert [t[:2] for t in after.tensors] == [t[:2] for t in graph.tensors]


def test_t21_unloading_says_what_is_no_longer_shared() -> None:
    model = adapted(a=lora("embed_tokens"))
    with pytest.warns(MultigraftWarning, match=r"embed_tokens\.weight shared.*tie_word_embeddings"):
        base = model.merge_and_unload()
    assert base.lm_head.weight is not base.model.embed_tokens.weight


def test_t21_trained_tokens_stay_shared_when_unloaded() -> None:
    model = adapted(a=TrainableTokensConfig(token_indices=[3, 9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MultigraftWarning)
        base = model.merge_and_unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
