"""T6, T7, T9: whoever reads a tensor instead of running its layer sees the adapter in it.

PEFT 0.21.2: LoRA on a `TransformerEncoderLayer` trains, and evaluates as the base model; on an
attention's `out_proj` it has no effect, no gradient, and appears when merged; on a parametrised
parameter it leaks one update for each forward. Its update of a targeted attention's `out_proj` is
added twice and differentiated once (not found on its tracker).
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from multigraft import LoraConfig, TargetError, get_peft_model
from tests.bases.attentions import Attending, X, adapted, encoder
from tests.bases.nets import Stacked, both, fill, seeded
from tests.laws import fingerprint
from tests.oracle import quiet


def test_t6_evaluation_is_what_was_trained() -> None:
    model = adapted(encoder, ["linear1", "linear2"])
    trained = model.train()(X)
    with torch.no_grad():
        base = seeded(encoder)(X)
        evaluated = model.eval()(X)
    torch.testing.assert_close(evaluated, trained)
    assert (evaluated - base).abs().max() > 0.1


def test_t6_is_still_so_in_peft() -> None:
    with quiet():
        theirs = peft.get_peft_model(
            seeded(encoder), peft.LoraConfig(target_modules=["linear1"], init_lora_weights=False)
        )
    with torch.no_grad():
        assert torch.equal(theirs.eval()(X), seeded(encoder)(X))


def test_t7_out_proj_acts_trains_and_merges_to_what_it_was() -> None:
    model = adapted(Attending, ["out_proj"]).train()
    y = model(X)
    assert (y - seeded(Attending)(X)).abs().max() > 0.1
    y.sum().backward()
    tensors = [p for p in model.parameters() if p.requires_grad]
    assert tensors and all(p.grad is not None and p.grad.abs().max() > 0 for p in tensors)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)


def test_t9_forwards_leave_nothing_behind() -> None:
    model = get_peft_model(
        seeded(Stacked), LoraConfig(target_modules=[], target_parameters=["experts.up"])
    )
    fill(model)
    x = torch.randn(4, 6)
    before, y = fingerprint(model), model(x)
    for _ in range(3):
        assert torch.equal(model(x), y)
    assert fingerprint(model) == before


def test_t9_a_parametrised_parameter_is_refused() -> None:
    base = seeded(Stacked)
    parametrizations.orthogonal(base.experts, "mix")
    before = fingerprint(base)
    config = LoraConfig(target_modules=[], target_parameters=["experts.mix"])
    with pytest.raises(TargetError, match="computed from others"):
        get_peft_model(base, config)
    assert fingerprint(base) == before


def test_gradients_of_an_attentions_projection_are_those_of_the_forward() -> None:
    options = {"target_modules": ["attn"], "r": 1, "lora_alpha": 1}
    ours, theirs = both(Attending, options)
    torch.testing.assert_close(ours(X), theirs(X))  # the same function, so one of the two is right
    ours.double()
    factors = [p for n, p in ours.named_parameters() if "out_proj" in n and p.requires_grad]
    assert len(factors) == 2
    assert torch.autograd.gradcheck(lambda *_: ours(X[:1].double()), factors)
    assert isinstance(ours.get_base_model().attn.base_layer, nn.MultiheadAttention)
