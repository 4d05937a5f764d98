"""Attentions and the parents that read tensors: in training, evaluation, merged, beside PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, MultigraftWarning, RoutingError, TargetError, get_peft_model
from tests.bases.attentions import MODELS, Attending, X, adapted, dense, encoder, weights
from tests.bases.nets import Stacked, both, fill, gradients, loaded, seeded, wrappers
from tests.laws import fingerprint

every_model = pytest.mark.parametrize("name", MODELS)


# -- as PEFT has it ----------------------------------------------------------------------------


@every_model
def test_training_forward_and_gradients_are_pefts(name: str) -> None:
    maker, target = MODELS[name]
    ours, theirs = both(maker, {"target_modules": target, "r": 2, "lora_alpha": 3})
    y, expected = ours.train()(X), theirs.train()(X)
    torch.testing.assert_close(y, expected)
    grads, theirs_grads = gradients(ours, y), gradients(theirs, expected)
    assert grads.keys() == theirs_grads.keys()
    for key, grad in grads.items():
        # PEFT adds this update twice, the second time where autograd does not see it.
        times = 2 if "base_layer.out_proj" in key else 1
        torch.testing.assert_close(grad, times * theirs_grads[key], atol=1e-4, rtol=1e-4, msg=key)


@every_model
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    maker, target = MODELS[name]
    ours, theirs = both(maker, {"target_modules": target, "r": 2})
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    y = ours.train()(X)
    for library, folder in {peft: "ours", multigraft: "theirs"}.items():
        other = loaded(maker, tmp_path / folder, library).train()(X)
        torch.testing.assert_close(other, y, atol=1e-4, rtol=1e-4)


def test_merged_weights_are_pefts() -> None:
    ours, theirs = both(Attending, {"target_modules": ["attn", "cross"], "r": 2})
    merged = dict(ours.merge_and_unload().named_parameters())
    for key, value in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[key], value, msg=key)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_pefts(bias: str) -> None:
    ours, theirs = both(Attending, {"target_modules": ["attn", "head"], "r": 2, "bias": bias})
    torch.testing.assert_close(ours(X), theirs(X))


def test_patterns_name_the_attention_for_both_of_its_matrices() -> None:
    given = {"target_modules": ["attn", "cross"], "rank_pattern": {"attn": 3}}
    ours, theirs = both(Attending, given | {"alpha_pattern": {"cross": 5}, "r": 2})
    torch.testing.assert_close(ours(X), theirs(X))
    assert weights(ours)["attn.base_layer.out_proj.lora_A.weight"].shape == (3, 8)


def test_target_parameters_of_an_attention_are_pefts(tmp_path: Path) -> None:
    given = {"target_modules": [], "target_parameters": ["attn.in_proj_weight"], "r": 2}
    ours, theirs = both(Attending, given)
    torch.testing.assert_close(ours.train()(X), theirs.train()(X))
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(loaded(Attending, tmp_path, peft).train()(X), ours(X))


# -- train, evaluate, merge: one function ------------------------------------------------------


@every_model
@pytest.mark.parametrize("target", ["as listed", "all-linear", ["out_proj"]])
def test_training_evaluation_and_merging_agree(name: str, target: Any) -> None:
    maker, listed = MODELS[name]
    model = adapted(maker, listed if target == "as listed" else target)
    expected = dense(maker, weights(model)).train()(X)
    assert (expected - seeded(maker).train()(X)).abs().max() > 1e-2
    torch.testing.assert_close(model.train()(X), expected)
    torch.testing.assert_close(model.eval()(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)


def test_the_fast_path_is_taken_and_reads_the_adapted_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, real = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or real(*args)
    )
    model = adapted(encoder, ["self_attn", "linear1", "linear2"])
    expected = dense(encoder, weights(model)).train()(X)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    assert len(taken) == 2
    padding = torch.tensor([[False] * (5 - i) + [True] * i for i in range(4)])
    with torch.no_grad():
        y = model(X, src_key_padding_mask=padding)
        z = dense(encoder, weights(model))(X, src_key_padding_mask=padding)
    torch.testing.assert_close(y, z)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(X), seeded(encoder).requires_grad_(False)(X))


@pytest.mark.parametrize("target", [["self_attn"], ["out_proj", "linear1"]])
def test_dora_acts_on_an_attention_in_every_mode(target: list[str]) -> None:
    model = adapted(encoder, target, use_dora=True)
    y = model.train()(X)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), y)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)


def test_a_bias_of_the_low_rank_path_acts_where_the_layer_has_one() -> None:
    model = adapted(encoder, ["out_proj", "linear1"], lora_bias=True)
    y = model.train()(X)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), y)
        for layer in wrappers(model):
            for leaf in ("self_attn", "linear1"):
                if layer.path.endswith(leaf):
                    layer.lora_B["default"].get_parameter(
                        "out_proj.bias" if leaf == "self_attn" else "bias"
                    ).zero_()
    assert not torch.allclose(model(X), y)


@pytest.mark.slow
@pytest.mark.parametrize("maker", [Attending, Stacked])
def test_compiling_needs_one_graph(maker: Any) -> None:
    named = [] if maker is Attending else ["up", "down", "mix"]
    config = LoraConfig(target_modules="all-linear", target_parameters=named or None, r=2)
    model = get_peft_model(seeded(maker), config)
    fill(model)
    x = X if maker is Attending else X[0, :, :6]
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, y)
    assert compiled.requires_grad


# -- what is refused, or said ------------------------------------------------------------------


def test_rows_of_a_batch_cannot_have_attentions_of_their_own() -> None:
    model = adapted(Attending, ["attn"])
    with pytest.raises(RoutingError, match=r"`default` acts on attn\.in_proj_weight"):
        model(X, adapter_names=["default"] * 4)


def test_rows_have_feed_forward_layers_of_their_own_where_these_run() -> None:
    model = adapted(encoder, ["linear1", "linear2"])
    names = ["default", "__base__", "default", "__base__"]
    with torch.no_grad(), pytest.raises(RoutingError, match="Switch the fast path off"):
        model(X, adapter_names=names)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            y, own = model(X, adapter_names=names), model(X)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(y[::2], own[::2])
    torch.testing.assert_close(y[1::2], seeded(encoder).train()(X)[1::2])


def test_dropout_on_an_attention_is_said_to_have_no_effect() -> None:
    with pytest.warns(MultigraftWarning, match=r"dropout has no effect on attn\.in_proj_weight"):
        model = get_peft_model(
            seeded(Attending), LoraConfig(target_modules=["attn"], lora_dropout=0.5)
        )
    fill(model)
    assert torch.equal(model.train()(X), model(X))


@pytest.mark.parametrize(
    ("maker", "more", "message"),
    [
        (lambda: Attending(kdim=8, vdim=4), {}, "have sizes of their own here"),
        (Attending, {"lora_bias": True}, "`lora_bias` has no bias of the base"),
    ],
)
def test_an_attention_that_cannot_be_adapted_is_refused(
    maker: Any, more: Any, message: str
) -> None:
    base = seeded(maker)
    before = fingerprint(base)
    with pytest.raises(TargetError, match=message):
        get_peft_model(base, LoraConfig(target_modules=["attn"], **more))
    assert fingerprint(base) == before


def test_matrices_of_their_own_sizes_are_targets_by_name() -> None:
    maker = lambda: nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))  # noqa: E731
    base = seeded(maker)
    names = ["0.q_proj_weight", "0.k_proj_weight", "0.v_proj_weight"]
    config = LoraConfig(target_modules=["out_proj"], target_parameters=names, r=2)
    model = get_peft_model(base, config)
    fill(model)
    k, v = torch.randn(4, 5, 6), torch.randn(4, 5, 4)
    attention: Any = base[0]
    y, _ = attention(X, k, v)
    model.merge_adapter()
    torch.testing.assert_close(attention(X, k, v)[0], y)


def test_an_attention_that_is_the_whole_model_is_refused_for_its_projection() -> None:
    with pytest.raises(TargetError, match="the model itself"):
        get_peft_model(nn.MultiheadAttention(8, 2), LoraConfig(target_modules=["out_proj"]))
