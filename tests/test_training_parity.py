"""Precision and training, side by side with the real PEFT: rounding, gradients, dropout, steps."""

from __future__ import annotations

import contextlib
import copy

import peft
import pytest
import torch

import multigraft
from multigraft import AdaptedLayer
from tests import oracle
from tests.oracle import (
    KINDS,
    Net,
    Pair,
    add_to_both,
    assert_same_gradients,
    build,
    gradients,
    graft_pair,
    output,
    train_step,
)


def half_pair(seed: int, float_adapters: bool) -> Pair:
    """A bfloat16 base; adapters whose updates are about as large as its weights."""
    options = {"target_modules": "all-linear", "r": 4}
    sides = ((multigraft, oracle.our_config(options)), (peft, oracle.peft_config(options)))
    ours, theirs = (
        library.get_peft_model(
            build(oracle.llama, seed).bfloat16(), config, autocast_adapter_dtype=float_adapters
        ).eval()
        for library, config in sides
    )
    pair = Pair(ours, theirs, oracle.inputs(ours, seed=seed))
    oracle.same_weights(pair, seed=seed, std=0.1)
    return pair


@torch.no_grad()
def rounding_errors(float_adapters: bool, autocast: bool) -> tuple[float, float]:
    """Ours and PEFT's: ‖output - truth‖ / ‖truth‖, root mean square over seeds; truth: float64."""
    squares = [0.0, 0.0]
    for seed in range(8):
        pair = half_pair(seed, float_adapters)
        truth = output(copy.deepcopy(pair.theirs).double(), pair.batch)
        amp = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with amp:
            found = pair.outputs()
        for side, value in enumerate(found):
            assert value.dtype == torch.bfloat16
            squares[side] += float((value.double() - truth).norm() / truth.norm()) ** 2
    return squares[0] ** 0.5, squares[1] ** 0.5


@pytest.mark.parametrize(
    ("float_adapters", "autocast", "factor"),
    [
        (False, False, 1.0),
        (False, True, 1.0),
        (True, True, 1.0),
        # PEFT copies every input to float32 here; we round the small factors instead, and save the
        # copy. Updates smaller than the weights, as adapters' are, bring the factor down to 1.
        (True, False, 1.3),
    ],
)
def test_half_precision_bases_round_no_worse(
    float_adapters: bool, autocast: bool, factor: float
) -> None:
    ours, theirs = rounding_errors(float_adapters, autocast)
    assert ours <= factor * theirs


@pytest.mark.parametrize("float_adapters", [True, False])
def test_adapters_of_half_precision_bases_have_the_same_dtype(float_adapters: bool) -> None:
    pair = half_pair(0, float_adapters)
    dtypes = [
        {p.dtype for n, p in m.named_parameters() if "lora_" in n} for m in (pair.ours, pair.theirs)
    ]
    assert dtypes[0] == dtypes[1] == {torch.float32 if float_adapters else torch.bfloat16}


def test_autocast_agrees_within_rounding() -> None:
    pair = graft_pair(Net, {"target_modules": KINDS, "r": 4})
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = pair.outputs()
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = pair.outputs()[0]
    assert (ours.float() - theirs.float()).abs().max() < 0.05 * exact.abs().max()
    assert (ours.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    pair = graft_pair(oracle.llama, {"target_modules": "all-linear", "r": 2})
    train_step(pair)
    plain = gradients(pair.ours)
    for model in (pair.ours, pair.theirs):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train_step(pair)
    assert_same_gradients(pair)
    for name, value in gradients(pair.ours).items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=1e-4)


def test_a_base_that_checkpoints_gets_gradients_without_further_ado() -> None:
    base = build(oracle.llama)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    ours = multigraft.get_peft_model(base, oracle.our_config({"target_modules": ["q_proj"]}))
    ours.train()
    output(ours, oracle.inputs(ours)).square().mean().backward()
    assert len(gradients(ours)) == 4


def test_dropout_with_the_same_seed_gives_the_same_numbers() -> None:
    pair = graft_pair(oracle.llama, {"target_modules": "all-linear", "lora_dropout": 0.4})
    add_to_both(pair, "b", {"target_modules": "all-linear", "lora_dropout": 0.2})
    results = []
    for model in (pair.ours, pair.theirs):
        model.base_model.set_adapter(["default", "b"])
        model.train()
        torch.manual_seed(11)
        results.append(output(model, pair.batch))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0], output(pair.ours.eval(), pair.batch), atol=1e-3)


def test_an_epoch_of_training_ends_at_the_same_weights() -> None:
    pair = graft_pair(oracle.llama, {"target_modules": "all-linear", "r": 2})
    for model in (pair.ours, pair.theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            output(model, pair.batch).square().mean().backward()
            optimizer.step()
    ours = multigraft.get_peft_model_state_dict(pair.ours)
    theirs = oracle.peft_state(pair.theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_a_scaled_embedding_scales_the_update_too() -> None:
    pair = graft_pair(oracle.gemma, {"target_modules": ["embed_tokens"], "r": 3})
    (layer,) = (m for m in pair.ours.modules() if isinstance(m, AdaptedLayer))
    assert float(layer.base_layer.embed_scale) == 4.0
    ids = pair.batch["input_ids"]
    state = multigraft.get_peft_model_state_dict(pair.ours)
    A, B = (next(v for k, v in state.items() if k.endswith(end)) for end in ("_A", "_B"))
    update = (B @ A).T[ids] * layer.scaling["default"] * 4.0
    torch.testing.assert_close(layer(ids), layer.base_layer(ids) + update)
    pair.assert_equal()
