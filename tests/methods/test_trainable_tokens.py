"""Trainable tokens against PEFT: rows of an embedding, alone or beside a LoRA, and tied heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import (
    ConfigError,
    LoraConfig,
    StateError,
    TargetError,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from tests import oracle
from tests.laws import fingerprint
from tests.methods.against_peft import (
    ROWS,
    AgreesWithPeft,
    Case,
    One,
    StartsLikePeft,
    config_at,
    tensors_at,
)
from tests.oracle import build, output, quiet

TOKENS = {"token_indices": [7, 2, 5]}
LORA = {"target_modules": ["q_proj"], "r": 2}


class Causal(nn.Module):
    """A language model in the form that the suite wants: one tensor in, one out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.inner.get_input_embeddings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens)`` to logits ``(batch, tokens, vocabulary)``."""
        return self.inner(x).logits

    def batch(self) -> torch.Tensor:
        """Tokens that are trained, and others."""
        return torch.tensor([[2, 3, 7, 7, 5], [1, 2, 9, 4, 2]])


class TestTrainableTokens(StartsLikePeft):
    kind = "TrainableTokensConfig"
    cases: ClassVar = {
        "embedding": Case("embedding", TOKENS),
        "padding": Case(lambda: One(nn.Embedding(20, 8, padding_idx=2), (ROWS, 40)), TOKENS),
        "linear layer": Case("linear wide", TOKENS),
        "random start": Case("embedding", TOKENS | {"init_weights": False}),
        "model": Case(lambda: Causal(oracle.llama()), TOKENS | {"target_modules": None}),
        "scaled embedding": Case(
            lambda: Causal(oracle.gemma(tie_word_embeddings=False)),
            TOKENS | {"target_modules": None},
        ),
    }


class TestBesideLora(AgreesWithPeft):
    """`trainable_token_indices` of a LoRA; in memory we name no wrapper inside the layer."""

    kind = "LoraConfig"
    cases: ClassVar = {
        "list": Case(lambda: Causal(oracle.llama()), LORA | {"trainable_token_indices": [7, 2, 5]}),
        "table": Case(
            lambda: Causal(oracle.llama()),
            LORA | {"trainable_token_indices": {"embed_tokens": [2], "lm_head": [1, 7]}},
        ),
        "head alone": Case(
            lambda: Causal(oracle.llama()), LORA | {"trainable_token_indices": {"lm_head": [7]}}
        ),
        "scaled embedding": Case(
            lambda: Causal(oracle.gemma(tie_word_embeddings=False)),
            LORA | {"trainable_token_indices": [2]},
        ),
    }
    renamed: ClassVar = {".token_adapter": ""}


TIED = {
    "own config": {"kind": "TrainableTokensConfig", "token_indices": [7, 2, 5]},
    "beside LoRA": LORA | {"trainable_token_indices": [7, 2, 5]},
    "beside LoRA, by name": LORA | {"trainable_token_indices": {"embed_tokens": [7, 2, 5]}},
}


def tied_llama() -> nn.Module:
    return oracle.llama(tie_word_embeddings=True)


def tied_t5() -> nn.Module:
    return oracle.t5(tie_word_embeddings=True)


@pytest.fixture(params=TIED.values(), ids=TIED)
def tied(request: pytest.FixtureRequest) -> oracle.Pair:
    """A model whose head shares the embedding's weight, in both libraries."""
    pair = oracle.graft_pair(tied_llama, {"task_type": "CAUSAL_LM", **request.param})
    pair.batch = {"input_ids": torch.tensor([[2, 3, 7, 7, 5], [1, 2, 9, 4, 2]])}
    return pair


def test_a_tied_head_uses_the_trained_rows_as_in_peft(tied: oracle.Pair) -> None:
    ours = tied.assert_equal()
    with tied.ours.disable_adapter():
        plain = output(tied.ours, tied.batch)
    assert (ours - plain)[..., [7, 2, 5]].abs().max() > 0.1


def test_gradients_of_tied_rows_come_from_both_places(tied: oracle.Pair) -> None:
    found = []
    for model in (tied.ours, tied.theirs):
        output(model, tied.batch).sin().sum().backward()
        gradients = {
            n.replace(".token_adapter", ""): p.grad
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        found.append(gradients)
    assert sorted(found[0]) == sorted(found[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)


def test_merged_tied_models_agree(tied: oracle.Pair) -> None:
    before = output(tied.ours, tied.batch)
    own = tied.ours.merge_and_unload()
    with quiet():
        other = tied.theirs.merge_and_unload()
    assert own.lm_head.weight is own.model.embed_tokens.weight
    torch.testing.assert_close(output(own, tied.batch), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(own.lm_head.weight, other.lm_head.weight)


def test_unmerging_tied_rows_restores_the_bits(tied: oracle.Pair) -> None:
    base = tied.ours.get_base_model()
    bits, before = fingerprint(base).bits, output(tied.ours, tied.batch)
    tied.ours.merge_adapter()
    tied.ours.unmerge_adapter()
    assert fingerprint(base).bits == bits
    assert torch.equal(output(tied.ours, tied.batch), before)


def test_files_of_tied_models_are_the_same_both_ways(
    tied: oracle.Pair, tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tied.ours.save_pretrained(ours)
    with quiet():
        tied.theirs.save_pretrained(theirs)
    written, expected = tensors_at(ours), tensors_at(theirs)
    assert sorted(written) == sorted(expected)
    assert all(torch.equal(written[k], expected[k]) for k in written)
    assert config_at(ours) == config_at(theirs)
    with quiet():
        there = peft.PeftModel.from_pretrained(build(tied_llama), ours).eval()
    recwarn.clear()
    here = multigraft.PeftModel.from_pretrained(build(tied_llama), theirs).eval()
    assert not recwarn.list
    torch.testing.assert_close(output(there, tied.batch), output(tied.ours, tied.batch))
    torch.testing.assert_close(output(here, tied.batch), output(tied.ours, tied.batch))


def test_an_encoder_and_a_decoder_that_share_one_embedding_share_its_rows() -> None:
    pair = oracle.graft_pair(
        tied_t5, {"task_type": "SEQ_2_SEQ_LM", "trainable_token_indices": [7, 2, 5]}
    )
    pair.batch = {k: torch.tensor([[2, 3, 7, 7, 5]]) for k in pair.batch}
    pair.assert_equal()


def test_naming_the_tied_head_as_well_changes_nothing() -> None:
    model, batch = two_adapters(tied_llama)
    named = TrainableTokensConfig(token_indices=[2, 5], target_modules=["embed_tokens", "lm_head"])
    model.add_adapter("named", named)
    state = get_peft_model_state_dict(model)
    assert sorted(get_peft_model_state_dict(model, adapter_name="named")) == sorted(state)
    multigraft.set_peft_model_state_dict(model, state, "named")
    expected = output(model, batch)
    model.set_adapter("named")
    assert torch.equal(output(model, batch), expected)


def test_detaching_tied_rows_leaves_no_trace() -> None:
    base = tied_llama()
    before = fingerprint(base)
    model = get_peft_model(base, LoraConfig(**LORA, trainable_token_indices=[3]))
    model.add_adapter("rows", TrainableTokensConfig(token_indices=[3, 4]))
    model.delete_adapter("default")
    model.unload()
    assert fingerprint(base) == before


def two_adapters(maker: Callable[[], nn.Module]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with two adapters whose tokens overlap, and a batch."""
    model = get_peft_model(build(maker), TrainableTokensConfig(token_indices=[2, 5])).eval()
    model.add_adapter("other", TrainableTokensConfig(token_indices=[5, 9]))
    with torch.no_grad():
        for name in ("default", "other"):
            for key, rows in get_peft_model_state_dict(model, adapter_name=name).items():
                torch.manual_seed(len(key) + len(name))
                rows.normal_()
    return model, {"input_ids": torch.tensor([[2, 5, 9, 1]])}


def test_two_adapters_that_train_the_same_token_add_up() -> None:
    model, batch = two_adapters(oracle.llama)
    words = model.get_base_model().model.embed_tokens
    ids = batch["input_ids"]
    plain = words.base_layer(ids)
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(words(ids) - plain)
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(words(ids), plain + changes[0] + changes[1])


def test_each_row_of_a_batch_has_its_own_trained_tokens() -> None:
    model, batch = two_adapters(tied_llama)
    ids = batch["input_ids"]
    names = ["other", "__base__", "default"]
    mixed = model(ids.expand(3, -1), adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(ids).logits
        else:
            model.set_adapter(name)
            alone = model(ids).logits
        torch.testing.assert_close(mixed[row : row + 1], alone)


def test_one_of_two_tied_adapters_can_be_merged_while_the_other_acts() -> None:
    model, batch = two_adapters(tied_llama)
    model.set_adapter(["default", "other"])
    expected = output(model, batch)
    bits = fingerprint(model.get_base_model()).bits
    model.merge_adapter(["other"])
    torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert fingerprint(model.get_base_model()).bits == bits


def test_a_method_that_reads_the_heads_weight_waits_until_tied_rows_are_unmerged() -> None:
    model, _ = two_adapters(tied_llama)
    model.add_adapter("hira", multigraft.HiraConfig(target_modules=["lm_head"], r=2))
    model.merge_adapter(["default"])
    with pytest.raises(StateError, match="Unmerge them first"):
        model.set_adapter(["default", "hira"])


def test_the_scaling_of_a_lora_is_that_of_the_lora_beside_trained_tokens() -> None:
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["embed_tokens"], trainable_token_indices=[3]
    )
    model = get_peft_model(oracle.llama(), config)
    assert model.get_base_model().model.embed_tokens.scaling == {"default": 3.0}


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    base = oracle.llama()
    before = fingerprint(base)
    with pytest.raises(TargetError, match="tokens \\[40\\] are not among its rows; it has 40 rows"):
        get_peft_model(base, TrainableTokensConfig(token_indices=[3, 40]))
    assert fingerprint(base) == before


@pytest.mark.parametrize("tokens", [[1, 1], [-1], ["a"], [True], "12", 3])
def test_what_is_no_list_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"token_indices.*different token ids"):
        TrainableTokensConfig(token_indices=tokens)
    with pytest.raises(ConfigError, match=r"trainable_token_indices.*different token ids"):
        LoraConfig(trainable_token_indices={"embed_tokens": tokens})


def test_no_token_at_all_is_refused() -> None:
    with pytest.raises(TargetError, match="no token is named"):
        get_peft_model(oracle.llama(), TrainableTokensConfig())


def test_a_tied_head_with_tokens_of_its_own_is_refused() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}
    )
    with pytest.raises(TargetError, match=r"lm_head shares its weight with model\.embed_tokens"):
        get_peft_model(tied_llama(), config)


def test_tokens_of_a_module_that_is_saved_whole_are_refused() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[1], modules_to_save=["embed_tokens"]
    )
    with pytest.raises(TargetError, match="in `modules_to_save` as well"):
        get_peft_model(oracle.llama(), config)


def test_an_unknown_module_of_tokens_is_named_with_the_nearest() -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_token": [1]})
    with pytest.raises(TargetError, match=r"no module is called `embed_token`.*`embed_tokens`"):
        get_peft_model(oracle.llama(), config)
