"""PEFT on bitsandbytes layers: the same outputs, gradients and merged weights, and not its defects.

PEFT 0.21.2, on `Linear4bit`: `lora_bias=True` merges the bias without its scale; `safe_merge`
raises after it has overwritten the weight; a layer in a model without the flag
`is_loaded_in_4bit` is taken for a plain linear layer, whose merge fails on the shapes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from multigraft import (
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from multigraft.storage import storage_of
from tests.laws import fingerprint
from tests.storage.cases import CASES

FLAGS = {"bnb-int8": "is_loaded_in_8bit"}
BITSANDBYTES = [name for name in CASES if name.startswith("bnb-")]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        warnings.filterwarnings("ignore", "Merge lora module to", UserWarning)
        warnings.filterwarnings("ignore", "Unmerge lora module to", UserWarning)
        yield


def net(name: str, flagged: bool = True) -> nn.Sequential:
    case = CASES[name]
    model = nn.Sequential(case.make(64, 128, seed=1), nn.Tanh(), case.make(128, 64, seed=2))
    if flagged:
        setattr(model, FLAGS.get(name, "is_loaded_in_4bit"), True)
    return model.train()


def both(name: str, **options: Any) -> tuple[PeftModel, Any]:
    """The same adapter by us and by PEFT, each on its own equal base."""
    fields = {"r": 4, "lora_alpha": 64, "target_modules": ["0", "2"], **options}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(net(name), peft.LoraConfig(**fields, init_lora_weights=False))
    ours = get_peft_model(net(name), LoraConfig(**fields))
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs


def rows() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(3))


def weights(model: Any) -> list[Tensor]:
    layers = [model.base_model.model[i].base_layer for i in (0, 2)]
    return [storage_of(layer).read(layer) for layer in layers]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_outputs_and_gradients_are_pefts(name, options):
    ours, theirs = both(name, **OPTIONS[options])
    found, wanted = ours(rows()), theirs(rows())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.square().mean().backward()
    wanted.square().mean().backward()
    named = dict(ours.named_parameters())
    trained = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) >= 4
    for key, gradient in trained.items():
        torch.testing.assert_close(named[key].grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_adapters_have_pefts_dtypes_and_keys(name):
    ours, theirs = both(name)
    state = get_peft_model_state_dict(ours)
    wanted = peft.get_peft_model_state_dict(theirs)
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in wanted.items()}


@pytest.mark.parametrize("options", ["plain", "rank-stabilised"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_merged_weights_are_pefts_within_one_rounding(name, options):
    ours, theirs = both(name, **OPTIONS[options])
    ours.merge_adapter()
    theirs.merge_adapter()
    for found, wanted in zip(weights(ours), weights(theirs), strict=True):
        # 4 bits: the very same; 8 bits: PEFT rounds through float16.
        bound = 3e-3 if name == "bnb-int8" else 1e-6
        assert float((found - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_unmerging_gives_the_bits_back_where_peft_subtracts_and_rounds_again(name):
    ours, theirs = both(name)
    before, wanted = fingerprint(ours), weights(theirs)
    for model in (ours, theirs):
        model.merge_adapter()
        model.unmerge_adapter()
    assert fingerprint(ours) == before
    assert any(not torch.equal(a, b) for a, b in zip(weights(theirs), wanted, strict=True))


# -- PEFT's defects -------------------------------------------------------------------------------


def with_bias(model: Any) -> Any:
    """Only the biases of B act: a change of 1.0 before the scale of 16."""
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.fill_(1.0 if key.endswith("bias") else 0.0)
    return model


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_bias_is_merged_with_the_scale_that_the_forward_gives_it(name):
    ours, theirs = (with_bias(model) for model in both(name, lora_bias=True))
    own = [ours.base_model.model[i].base_layer.bias.clone() for i in (0, 2)]
    for model, added in ((ours, 16.0), (theirs, 1.0)):
        model.merge_adapter()
        merged = [model.base_model.model[i].base_layer.bias for i in (0, 2)]
        for after, before in zip(merged, own, strict=True):
            torch.testing.assert_close(after, before + added)


@pytest.mark.parametrize("name", [n for n in BITSANDBYTES if n != "bnb-int8"])
def test_a_safe_merge_with_a_bias_adds_the_change_once(name):
    ours, theirs = both(name, lora_bias=True)
    apart, plain = ours(rows()), net(name)(rows())
    ours.merge_adapter(safe_merge=True)
    assert float((ours(rows()) - apart).norm() / apart.norm()) < 0.4
    ours.unmerge_adapter()
    # PEFT: the first layer's weight is written, the check of its bias fails, and the adapter goes
    # on adding to what holds its change already.
    delta = theirs.base_model.model[0].get_delta_weight("default")
    own = weights(theirs)[0]
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        theirs.merge_adapter(safe_merge=True)
    assert theirs.base_model.model[0].merged_adapters == []
    torch.testing.assert_close(weights(theirs)[0], own + delta, rtol=0, atol=float(delta.std()))
    assert not torch.allclose(theirs(rows()), apart, atol=float((apart - plain).std()))


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.parametrize("broken", ["lora_B.default.weight", "lora_B.default.bias"])
def test_a_safe_merge_that_fails_at_the_last_layer_has_written_nothing(name, broken):
    ours, _ = both(name, lora_bias=True)
    last = dict(ours.named_parameters())[f"base_model.model.2.{broken}"]
    kept = last.detach().clone()
    y = ours(rows())
    last.data[0] = torch.nan
    before = fingerprint(ours)
    with pytest.raises(ValueError, match=r"^2: .*NaN.*nothing was merged"):
        ours.merge_adapter(safe_merge=True)
    assert fingerprint(ours) == before
    last.data.copy_(kept)
    assert torch.equal(ours(rows()), y)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_no_flag_of_the_model_is_needed(name):
    config = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False}
    model = get_peft_model(net(name, flagged=False), LoraConfig(**config))
    apart, before = model(rows()), fingerprint(model)
    model.merge_adapter()
    assert float((model(rows()) - apart).norm() / apart.norm()) < 0.4
    model.unmerge_adapter()
    assert fingerprint(model) == before


def test_without_the_flag_peft_takes_a_4_bit_layer_for_a_plain_one():
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(net("bnb-nf4", flagged=False), config)
    with pytest.raises(RuntimeError, match="size"):
        copy.copy(model).merge_adapter()
