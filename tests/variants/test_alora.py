"""aLoRA against PEFT: forwards, gradients, files, mixed and checkpointed batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import multigraft
from multigraft import ConfigError, LoraConfig, RoutingError, StateError, TargetError
from multigraft import PeftModel as Ours
from tests.methods.against_peft import config_at, near, tensors_at
from tests.oracle import quiet
from tests.variants.invoked import (
    IDS,
    INVOCATION,
    MASK,
    OPTIONS,
    SPANS,
    add,
    base,
    both,
    last,
    ours_alone,
)


@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}],
    ids=lambda more: ",".join(more) or "plain",
)
def test_outputs_and_gradients_agree(more: dict[str, Any]) -> None:
    ours, theirs = both(**more)
    found, expected = (m(IDS, attention_mask=MASK, labels=IDS) for m in (ours, theirs))
    near(found.logits, expected.logits)
    found.loss.backward(), expected.loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert mine.keys() == grads.keys() and mine
    for name, grad in mine.items():
        near(grad, grads[name], name)


def test_a_row_without_the_invocation_is_the_bases_to_the_bit() -> None:
    plain, ours = base(), ours_alone()
    with torch.no_grad():
        expected, found = plain(IDS).logits, ours(IDS).logits
    for row, span in enumerate(SPANS):
        before = IDS.shape[1] - span
        assert torch.equal(found[row, :before], expected[row, :before])
        assert (
            not span or not torch.isclose(found[row, before:], expected[row, before:]).any(0).all()
        )


def test_from_the_invocation_on_it_is_plain_lora() -> None:
    ours = ours_alone()
    plain = multigraft.get_peft_model(
        base(), LoraConfig(**(OPTIONS | {"alora_invocation_tokens": None}))
    ).eval()
    multigraft.set_peft_model_state_dict(plain, multigraft.get_peft_model_state_dict(ours))
    path = "model.layers.0.self_attn.q_proj"
    layer, same = (m.get_base_model().get_submodule(path) for m in (ours, plain))
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    ours(torch.tensor([[*INVOCATION, 1], [1, 2, 3]]))
    near(seen["y"][0], same(seen["x"])[0])
    assert torch.equal(seen["y"][1], layer.base_layer(seen["x"])[1])


def test_a_block_of_mixed_batches_finds_each_calls_invocations() -> None:
    ours = ours_alone()
    with torch.no_grad():
        expected = ours(IDS).logits
        with ours.mixed_batch(["default"] * 5):
            near(ours(IDS).logits, expected)
            near(ours(IDS.flip(0)).logits, expected.flip(0))


def test_offsets_that_are_given_agree_with_peft() -> None:
    ours, theirs = both()
    offsets = [3, None, 8, 20, 1]
    near(ours(IDS, alora_offsets=offsets).logits, theirs(IDS, alora_offsets=offsets).logits)


def test_embeddings_instead_of_tokens_need_offsets() -> None:
    """PEFT gives the base's output, with a warning."""
    ours = ours_alone()
    embedded = ours.get_input_embeddings()(IDS).detach()
    with pytest.raises(RoutingError, match=r"no token ids .*`alora_offsets`"):
        ours(inputs_embeds=embedded)
    found = ours(inputs_embeds=embedded, alora_offsets=[s or None for s in SPANS])
    near(found.logits, ours(IDS).logits)


def test_two_side_by_side_act_each_from_its_own_invocation() -> None:
    """PEFT looks for the first one's alone, and lets both act from there."""
    ours = ours_alone(target_modules=["lm_head"])
    add(ours, "other", 1, target_modules=["lm_head"], alora_invocation_tokens=[7])
    hidden = ours.get_base_model().model(IDS)[0].detach()
    with torch.no_grad():
        ours.set_adapter(["default", "other"])
        found = ours(IDS).logits
        expected = ours.lm_head.base_layer(hidden)
        for name, tokens in (("default", INVOCATION), ("other", [7])):
            layer = ours.lm_head
            A, B = (getattr(layer, part)[name].weight for part in ("lora_A", "lora_B"))
            for row, ids in enumerate(IDS):
                start = len(ids) - last(ids, tokens)
                expected[row, start:] += 2 * hidden[row, start:] @ A.T @ B.T
    near(found, expected)


def test_mixed_batches_agree() -> None:
    ours, theirs = both()
    add(ours, "other", 1, alora_invocation_tokens=[7])
    add(ours, "plain", 2, alora_invocation_tokens=None)
    with quiet():
        for name, tokens in (("other", [7]), ("plain", None)):
            config = peft.LoraConfig(**(OPTIONS | {"alora_invocation_tokens": tokens}))
            theirs.add_adapter(name, config)
            state = multigraft.get_peft_model_state_dict(ours, adapter_name=name)
            peft.set_peft_model_state_dict(theirs, state, name)
        names = ["default", "other", "plain", "__base__", "other"]
        expected = theirs.eval()(IDS, adapter_names=names).logits
    near(ours(IDS, adapter_names=names).logits, expected)


def test_a_mixed_batch_is_row_by_row() -> None:
    ours = ours_alone()
    add(ours, "other", 1, alora_invocation_tokens=[7])
    add(ours, "plain", 2, alora_invocation_tokens=None)
    names = ["default", "other", "plain", "__base__", "default"]
    with torch.no_grad():
        found = ours(IDS, adapter_names=names).logits
        written = ours.generate(IDS, adapter_names=names, max_new_tokens=3, do_sample=False)
        for row, name in enumerate(names):
            if name == "__base__":
                with ours.disable_adapter():
                    near(found[row], ours(IDS).logits[row])
                continue
            ours.set_adapter(name)
            near(found[row], ours(IDS).logits[row], name)
            alone = ours.generate(IDS, max_new_tokens=3, do_sample=False)
            assert torch.equal(written[row], alone[row])


@pytest.mark.parametrize("rule", ["cat", "linear", "svd"])
def test_those_of_one_invocation_combine_as_in_peft(rule: str) -> None:
    ours, theirs = both()
    add(ours, "other", 1)
    state = multigraft.get_peft_model_state_dict(ours, adapter_name="other")
    with quiet():
        theirs.add_adapter("other", peft.LoraConfig(**OPTIONS))
        peft.set_peft_model_state_dict(theirs, state, "other")
        for model in (ours, theirs):
            model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", rule)
            model.base_model.set_adapter(["sum"])
    near(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)
    assert torch.equal(ours(IDS[1:2]).logits, base()(IDS[1:2]).logits)


@pytest.mark.parametrize("tokens", [[7], None])
def test_those_of_different_invocations_do_not(tokens: list[int] | None) -> None:
    """PEFT gives the result the first one's."""
    ours = ours_alone()
    add(ours, "other", 1, alora_invocation_tokens=tokens)
    with pytest.raises(multigraft.UnsupportedError, match="act from different tokens of a row on"):
        ours.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    assert "sum" not in ours.peft_config


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_training_has_the_same_gradients(reentrant: bool) -> None:
    """Also when the second call comes before the first one's backward pass, which PEFT refuses."""
    ours = ours_alone()
    ours.train()

    def grads(checkpointed: bool) -> list[Tensor]:
        ours.zero_grad()
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
            ours.enable_input_require_grads()
        first, second = (ours(IDS[rows], labels=IDS[rows]).loss for rows in ([0, 1], [2, 3, 4]))
        first.backward(), second.backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    expected = grads(False)
    for one, other in zip(grads(True), expected, strict=True):
        near(one, other)


def test_checkpointed_mixed_batches_have_the_same_gradients() -> None:
    ours = ours_alone()
    add(ours, "plain", 2, alora_invocation_tokens=None)
    ours.base_model.set_requires_grad(["default", "plain"])
    ours.train()
    names = ["default", "plain", "default", "__base__", "plain"]
    found = []
    for checkpointed in (False, True):
        ours.zero_grad()
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours(IDS, labels=IDS, adapter_names=names).loss.backward()
        found.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(found[0]) == 2 * 2 * 3 * 2
    for one, other in zip(*found, strict=True):
        near(one, other)


def test_a_layer_outside_a_call_is_an_error_rather_than_the_base() -> None:
    """PEFT gives the base's output."""
    ours = ours_alone()
    with pytest.raises(StateError, match="inside a call of the model alone"):
        ours.get_base_model()(IDS)
    with ours.disable_adapter():
        ours.get_base_model()(IDS)


def test_merging_is_refused_with_the_remedy() -> None:
    ours = ours_alone()
    before = {n: p.clone() for n, p in ours.named_parameters()}
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(
            multigraft.UnsupportedError, match=r"\(alora\), .*Keep it as an adapter"
        ):
            merge()
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())


def test_files_of_either_load_in_the_other(tmp_path: Path) -> None:
    ours, theirs = both()
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    one, two = tensors_at(tmp_path / "ours"), tensors_at(tmp_path / "theirs")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert config_at(tmp_path / "ours") == config_at(tmp_path / "theirs")
    with quiet():
        there = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    here = Ours.from_pretrained(base(), tmp_path / "theirs").eval()
    expected = ours(IDS).logits
    near(there(IDS).logits, expected)
    near(here(IDS).logits, expected)


@pytest.mark.parametrize("tokens", [[], "ab", [1.0], [-1], [True], 5])
def test_what_is_no_list_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="`alora_invocation_tokens`"):
        LoraConfig(alora_invocation_tokens=tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [5, 40]}, "holds 40, and the model's tokens end at 39"),
        ({"target_modules": ["embed_tokens"]}, "is for linear layers that run"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        multigraft.get_peft_model(base(), LoraConfig(**(OPTIONS | options)))


def test_models_with_an_encoder_are_refused() -> None:
    config = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1)
    with pytest.raises(TargetError, match="has an encoder; use plain LoRA"):
        multigraft.get_peft_model(
            transformers.T5ForConditionalGeneration(config),
            LoraConfig(target_modules=["q"], alora_invocation_tokens=[5]),
        )


@pytest.mark.parametrize("offsets", [[1], [1, 2, 3, 4, -1], [1, 2, 3, 4, 1.5]])
def test_offsets_that_do_not_suit_the_batch_are_refused(offsets: list[Any]) -> None:
    with pytest.raises(RoutingError, match="does not suit a batch of 5"):
        ours_alone()(IDS, alora_offsets=offsets)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_compiled_model_has_one_graph(with_gradients: bool) -> None:
    ours = ours_alone()
    with torch.set_grad_enabled(with_gradients):
        expected = ours(IDS).logits
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        near(compiled(IDS).logits, expected)
