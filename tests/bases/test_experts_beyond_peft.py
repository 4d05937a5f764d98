"""Experts with what PEFT lacks there: dropout, mixed batches, combinations, one compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import multigraft
from multigraft import LoraConfig, MultigraftWarning, PeftModel, get_peft_model
from tests.bases import nets
from tests.bases.nets import MIXTURES, Stacked, fill, seeded

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def config(parameters: list[str], **more: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": [], "target_parameters": parameters, "r": 2, **more})


def stacked(*adapters: LoraConfig, turned: bool = False) -> PeftModel:
    """Adapters ``a``, ``b`` and so on, with values of their own."""
    model = get_peft_model(seeded(lambda: Stacked(turned)), adapters[0], "a")
    for name, more in zip("bcd", adapters[1:], strict=False):
        model.add_adapter(name, more)
    for seed, name in enumerate(model.peft_config):
        fill(model, name, seed)
    return model.eval()


def delta(model: PeftModel, name: str = "up") -> Tensor:
    """What adapters add to the parameter that the forward reads now."""
    experts = model.get_base_model().experts
    return getattr(experts, name) - getattr(experts.base_layer, name)


# -- several adapters on one parameter -----------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_adapters_on_one_parameter_sum_and_stay_apart(turned: bool):
    model = stacked(config(["up"]), config(["up", "down"], r=3, lora_alpha=5), turned=turned)
    alone = []
    for name in "ab":
        model.set_adapter(name)
        alone.append(delta(model))
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(delta(model), alone[0] + alone[1])
    both = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), both, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter(["b"])
    model.set_adapter("a")
    model.unmerge_adapter()
    torch.testing.assert_close(delta(model), alone[0])


# -- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_dropout_drops_features_of_each_experts_input_for_the_whole_call(turned: bool):
    model = stacked(config(["up"], lora_dropout=0.5), turned=turned)
    whole = delta(model)
    torch.manual_seed(0)
    thin = delta(model.train())
    by_feature = (thin if turned else thin.mT).flatten(0, 1)
    kept = by_feature.abs().amax(1) > 0
    assert 0 < int(kept.sum()) < len(kept)
    twice = 2 * (whole if turned else whole.mT).flatten(0, 1)
    torch.testing.assert_close(by_feature[kept], twice[kept])
    flags = kept.unflatten(0, (3, -1))
    assert not torch.equal(flags[0], flags[1])  # each expert has a mask of its own


def test_dropout_is_right_on_average_and_absent_in_evaluation():
    model = stacked(config(["up", "mix"], lora_dropout=0.25))
    whole = delta(model), delta(model, "mix")
    assert torch.equal(delta(model), whole[0])
    torch.manual_seed(0)
    model.train()
    for name, expected in zip(("up", "mix"), whole, strict=True):
        mean = torch.stack([delta(model, name) for _ in range(400)]).mean(0)
        assert (mean - expected).abs().max() < 0.2 * expected.abs().max()


def test_dropout_reaches_gradients_and_merging_ignores_it():
    model = stacked(config(["up"], lora_dropout=0.5))
    before = model(X)
    model.train()
    model.base_model.set_requires_grad("a")
    model(X).sum().backward()
    layer = model.get_base_model().experts
    assert (layer.lora_A["a"].weight.grad == 0).any(0).any()
    assert layer.lora_B["a"].weight.grad.abs().max() > 0
    torch.testing.assert_close(model.merge_and_unload().eval()(X), before)


def test_dropout_on_experts_says_nothing(recwarn: pytest.WarningsRecorder):
    stacked(config(["up"], lora_dropout=0.5))
    assert not [w for w in recwarn if issubclass(w.category, MultigraftWarning)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_model_trains_with_dropout_on_its_experts(name: str):
    model = get_peft_model(seeded(MIXTURES[name]), config(BOTH, lora_dropout=0.3, r=4)).train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    batch = nets.ids()
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


# -- mixed batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_rows_of_a_batch_have_experts_and_routers_of_their_own(name: str):
    router = "router.weight" if name == "gpt_oss" else "gate.weight"
    model = get_peft_model(seeded(MIXTURES[name]), config(BOTH, target_modules=["q_proj"]), "a")
    model.add_adapter("b", config(["experts.down_proj"]))
    model.add_adapter("c", config([router], target_modules=["v_proj"]))
    for seed, adapter in enumerate("abc"):
        fill(model, adapter, seed)
    model.eval()
    batch, names = nets.ids(), ["a", "__base__", ["b", "c"]]
    rows = []
    for index, entry in enumerate(names):
        own = {key: value[index : index + 1] for key, value in batch.items()}
        model.set_adapter(entry if entry != "__base__" else [])
        rows.append(model(**own).logits)
    mixed = model(**batch, adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.cat(rows), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_with_experts_of_their_own_generate():
    model = get_peft_model(seeded(MIXTURES["mixtral"]), config(BOTH), "a")
    fill(model, "a")
    model.eval()
    ids = nets.ids()["input_ids"][:2]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["a", "__base__"], **options)
    assert torch.equal(mixed[:1], model.generate(input_ids=ids[:1], **options))
    with model.disable_adapter():
        assert torch.equal(mixed[1:], model.generate(input_ids=ids[1:], **options))


# -- combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rule", ["cat", "svd", "linear"])
def test_experts_combine_with_weights(rule: str, turned: bool):
    model = stacked(config(["up"]), config(["up"]), turned=turned)
    parts = []
    for name in "ab":
        model.set_adapter(name)
        parts.append(delta(model))
    options = {"svd_rank": 4} if rule == "svd" else {}
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", rule, **options)
    model.set_adapter("sum")
    if rule != "linear":  # which sums the factors
        expected = 0.5 * parts[0] - 2.0 * parts[1]
        torch.testing.assert_close(delta(model), expected, atol=1e-4, rtol=1e-4)
    assert multigraft.get_peft_model_state_dict(model, adapter_name="sum")


# -- one graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_stacks_compile_without_a_break(training: bool):
    model = stacked(config(["up", "mix"], lora_dropout=0.2 * training), config(["up"]))
    model.set_adapter(["a", "b"])
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    y = compiled(X)
    if not training:
        torch.testing.assert_close(y, model(X))
    y.sum().backward()
    assert model.get_base_model().experts.lora_A["b"].weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_whole_mixtures_compile_without_a_break(name: str):
    model = get_peft_model(seeded(MIXTURES[name]), config(BOTH, target_modules=["q_proj"]))
    fill(model)
    model.eval()
    model.get_base_model().set_experts_implementation("batched_mm")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = nets.ids()
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
