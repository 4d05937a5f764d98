"""Several adapters, and methods other than LoRA, on layers whose tensors are read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from multigraft import (
    AdaptedLayer,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from multigraft.config import CONFIGS
from multigraft.methods import METHODS
from tests.bases.attentions import Attending, X, adapted, dense, encoder, weights
from tests.bases.nets import Stacked, both, fill, gradients, ids, mixtral, seeded, wrappers
from tests.laws import adapted_paths, assert_side_by_side, bits_of, fingerprint

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": ["attn"]},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}
LINEAR_METHODS = [n for n, m in METHODS.items() if "linear" in m.geometries and n in CONFIGS]


@pytest.mark.parametrize("target", [["attn", "cross"], ["out_proj", "head"]])
@pytest.mark.parametrize("method", LINEAR_METHODS)
def test_every_method_of_linear_layers_acts_on_an_attention(method: str, target: list[str]) -> None:
    base = seeded(Attending).double()
    own = {key: bits_of(p) for key, p in base.named_parameters()}
    model = get_peft_model(
        base, CONFIGS[method](target_modules=target, **OPTIONS.get(method, {}))
    ).eval()
    fill(model)
    x = X.double()
    y = model(x)
    assert (y - seeded(Attending).double()(x)).abs().max() > 1e-4
    tensors = [p for p in model.parameters() if p.requires_grad]
    assert all(g is not None for g in torch.autograd.grad(y.sum(), tensors, allow_unused=True))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unload()
    assert {key: bits_of(p) for key, p in base.named_parameters()} == own


def test_an_attention_is_one_adapted_layer_however_it_is_targeted() -> None:
    model = adapted(Attending, ["attn"])
    for name, target in {"b": ["out_proj"], "c": "all-linear", "d": ["attn", "out_proj"]}.items():
        model.add_adapter(name, LoraConfig(target_modules=target))
    base = model.get_base_model()
    assert_side_by_side(base, seeded(Attending))
    assert adapted_paths(base) == ["attn", "cross", "head"]
    sites = {
        n: sorted(str(g.site) for x in wrappers(base) for g in x.grafts.get(n, ())) for n in "bcd"
    }
    assert sites["b"] == ["attn.out_proj", "cross.out_proj"]
    assert sites["c"] == ["attn.out_proj", "cross.out_proj", "head"]
    assert sites["d"] == ["attn.in_proj_weight", "attn.out_proj", "cross.out_proj"]


def test_adapters_of_the_attention_and_of_its_projection_sum() -> None:
    model = adapted(encoder, ["self_attn"])
    first = weights(model)
    model.add_adapter("b", LoraConfig(target_modules=["out_proj", "linear1"], r=2, lora_alpha=3))
    second = fill(model, "b", seed=4)
    model.base_model.set_adapter(["default", "b"])
    plain = dense(encoder, first)
    for key, value in dense(encoder, second).named_parameters():
        plain.get_parameter(key).data += value.data - seeded(encoder).get_parameter(key).data
    expected = plain.train()(X)
    torch.testing.assert_close(model.train()(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), expected)
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(model(X), expected)


def test_what_was_done_is_undone_bit_for_bit() -> None:
    base = seeded(encoder)
    before = fingerprint(base)
    model = get_peft_model(base, LoraConfig(target_modules=["self_attn", "linear1"]))
    fill(model)
    model.add_adapter("b", LoraConfig(target_modules="all-linear"))
    fill(model, "b", seed=3)
    model.merge_adapter(adapter_names=["default", "b"])
    model.unmerge_adapter(["default"])
    model.delete_adapter("default")
    model.delete_adapter("b")
    assert fingerprint(base) == before


@pytest.mark.parametrize("saved", [["out_proj"], ["attn"]])
@pytest.mark.parametrize("lora_first", [True, False])
def test_a_trained_copy_stands_beside_another_adapters_update(
    saved: list[str], lora_first: bool
) -> None:
    lora = LoraConfig(target_modules=["attn"], r=2, lora_alpha=3)
    copied = LoraConfig(target_modules=["head"], modules_to_save=saved, r=2)
    order = {"lora": lora, "copy": copied} if lora_first else {"copy": copied, "lora": lora}
    base = seeded(Attending)
    model = get_peft_model(base, next(iter(order.values())), next(iter(order)))
    name, config = list(order.items())[1]
    model.add_adapter(name, config)
    state = fill(model, "lora")
    fill(model, "copy", seed=8)
    model.base_model.set_adapter(["copy"])
    alone = copy.deepcopy(model).merge_and_unload().eval()
    model.base_model.set_adapter(["lora", "copy"])
    change = dense(Attending, state)
    with torch.no_grad():
        for key, value in change.attn.named_parameters():
            own = seeded(Attending).attn.get_parameter(key)
            alone.attn.get_parameter(key).add_(value - own)
    expected = alone(X)
    torch.testing.assert_close(model.eval()(X), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.unload()
    assert {k: bits_of(p) for k, p in base.named_parameters()} == {
        k: bits_of(p) for k, p in seeded(Attending).named_parameters()
    }


def test_an_attentions_projection_can_be_looked_up_and_run() -> None:
    model = adapted(Attending, ["out_proj"])
    base = model.get_base_model()
    shown = base.get_submodule("attn.out_proj")
    assert shown.in_features == 8
    y = shown(X)
    plain = dense(Attending, weights(model))
    torch.testing.assert_close(y, plain.attn.out_proj(X))
    assert not any(isinstance(m, type(shown)) for m in base.modules())
    assert isinstance(base.attn, AdaptedLayer)


def test_a_scaling_changes_both_matrices_of_an_attention() -> None:
    model = adapted(Attending, ["attn"])
    layer = model.get_base_model().attn
    assert layer.r == {"default": 2}
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 3.0
    torch.testing.assert_close(model(X), dense(Attending, weights(model), scaling=3.0)(X))
    layer.unscale_layer()
    layer.scaling["default"] = 0.0
    torch.testing.assert_close(model(X), seeded(Attending)(X))


def test_a_trained_copy_of_the_experts_stands_beside_another_adapters_update() -> None:
    x = torch.linspace(-2, 2, 24).view(4, 6)
    base = seeded(Stacked)
    copied = LoraConfig(target_modules=["before"], modules_to_save=["experts"])
    model = get_peft_model(base, copied, "copy")
    named = LoraConfig(target_modules=[], target_parameters=["experts.up"], r=2)
    model.add_adapter("lora", named)
    fill(model, "copy"), fill(model, "lora", seed=4)
    expected = copy.deepcopy(model).merge_and_unload()
    model.set_adapter("lora")
    with torch.no_grad():
        change = base.experts.up - base.experts.base_layer.up
        expected.experts.up += change
    model.base_model.set_adapter(["copy", "lora"])
    torch.testing.assert_close(model(x), expected(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected(x))


def test_dora_acts_on_a_plain_matrix() -> None:
    x = torch.linspace(-2, 2, 24).view(4, 6)
    config = LoraConfig(target_modules=[], target_parameters=["experts.mix"], use_dora=True)
    model = get_peft_model(seeded(Stacked), config)
    torch.testing.assert_close(model(x), seeded(Stacked)(x))
    fill(model)
    y = model(x)
    assert not torch.allclose(y, seeded(Stacked)(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


def test_a_state_dict_chooses_modules_but_the_config_names_parameters() -> None:
    model = adapted(Attending, ["attn"])
    state = get_peft_model_state_dict(model)
    base = inject_adapter_in_model(LoraConfig(r=2), seeded(Attending), state_dict=state)
    assert adapted_paths(base) == ["attn"]
    named = LoraConfig(target_modules=[], target_parameters=["experts.up", "experts.down"])
    state = get_peft_model_state_dict(get_peft_model(seeded(Stacked), named))
    base = inject_adapter_in_model(named, seeded(Stacked), state_dict=state)
    assert adapted_paths(base) == ["experts"]


def test_recomputing_in_the_backward_pass_sees_the_adapted_experts() -> None:
    given = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "r": 2}
    model, _ = both(mixtral, given)
    plain = {k: g.clone() for k, g in gradients(model, model.train()(**ids())[0]).items()}
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, model(**ids())[0])
    assert again.keys() == plain.keys()
    for key, grad in again.items():
        torch.testing.assert_close(grad, plain[key], msg=key)
