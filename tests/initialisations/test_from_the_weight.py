"""PiSSA and OLoRA: where they begin, what they add, and PEFT beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, MultigraftWarning, PeftModel, TargetError, get_peft_model
from tests.initialisations.nets import batch, factors, net, off, options, ours, theirs, train
from tests.laws import fingerprint
from tests.oracle import quiet

EXACT = ["pissa", "olora"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("pissa", {}),
    ("olora", {}),
    ("pissa", {"use_rslora": True}),
    ("olora", {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 3}}),
    ("pissa", {"use_dora": True}),
]


@pytest.mark.parametrize(("init", "more"), CASES)
def test_factors_begin_where_pefts_do(init: str, more: dict[str, Any]) -> None:
    mine, other = ours(init, **more), theirs(init, **more)
    for path in ("first", "second"):
        (A, B), (A2, B2) = factors(mine, path), factors(other, path)
        assert off(A, A2) < 1e-5
        assert off(B, B2) < 1e-5


def test_pissa_on_conv1d_begins_where_pefts_does() -> None:
    more = {"target_modules": ["first"], "fan_in_fan_out": True}
    (A, B), (A2, B2) = (
        factors(make("pissa", net(turned=True), **more), "first") for make in (ours, theirs)
    )
    assert off(A, A2) < 1e-5
    assert off(B, B2) < 1e-5


@pytest.mark.parametrize(("init", "more"), CASES)
def test_trained_outputs_are_pefts(init: str, more: dict[str, Any]) -> None:
    mine, other = train(ours(init, **more)), train(theirs(init, **more))
    assert off(mine(batch()), net()(batch())) > 0.05
    assert off(mine(batch()), other(batch())) < 1e-5


def test_a_random_decomposition_with_iterations_is_near_the_exact_one() -> None:
    W = net().first.weight
    exact, fast = ours("pissa"), ours("pissa_niter_80")
    parts = [1.5 * B @ A for A, B in (factors(m, "first") for m in (exact, fast))]
    assert off(parts[1], parts[0]) < 1e-3
    U, S, Vh = torch.linalg.svd(W)
    assert off(parts[0], U[:, :4] * S[:4] @ Vh[:4]) < 1e-5


@pytest.mark.parametrize("init", [*EXACT, "pissa_niter_4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_gives_the_bases_very_output(init: str, dtype: torch.dtype) -> None:
    base, x = net(dtype=dtype), batch().to(dtype)
    expected = base(x)
    assert torch.equal(ours(init, base)(x), expected)


def test_steps_below_half_precision_are_not_lost_to_what_was_taken_out() -> None:
    """One rounding of the difference, where the difference of two roundings would lose it."""
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16().requires_grad_(False)
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(base, config).eval()
    graft = next(g for _, g in model.roster.grafts("default"))
    with torch.no_grad():
        graft.params["lora_B.weight"].add_(1e-5)
    A, B, scale = graft.method.low_rank(graft.params)
    exact = scale * 1e-5 * torch.ones(64, 8) @ graft.params["lora_A.weight"].detach()
    assert off(scale * (B.bfloat16() @ A.bfloat16()).float(), exact) < 0.02


@pytest.mark.parametrize("init", EXACT)
def test_gradients_are_those_of_pefts_pair(init: str) -> None:
    mine, other = train(ours(init)), train(theirs(init))
    for model in (mine, other):
        model(batch()).square().sum().backward()
    grads = [
        {
            n.replace("base_model.model.", ""): p.grad
            for n, p in m.named_parameters()
            if p.requires_grad
        }
        for m in (mine, other)
    ]
    assert grads[0].keys() == grads[1].keys()
    assert all(off(grads[0][name], grads[1][name]) < 1e-4 for name in grads[0])


@pytest.mark.parametrize("init", [*EXACT, "pissa_niter_4"])
def test_files_give_the_very_adapter_back(init: str, tmp_path: Path) -> None:
    model = train(ours(init))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))


@pytest.mark.parametrize(("init", "more"), CASES)
def test_pefts_files_give_pefts_output(init: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = train(theirs(init, **more))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert off(again(batch()), model(batch())) < 1e-5


@pytest.mark.parametrize(("init", "more"), CASES)
def test_peft_reads_our_files(init: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = train(ours(init, **more))
    model.save_pretrained(tmp_path)
    with quiet():
        again = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    assert off(again(batch()), model(batch())) < 1e-5


def test_pefts_file_of_a_random_decomposition_is_read_with_a_warning(tmp_path: Path) -> None:
    theirs("pissa_niter_4").save_pretrained(tmp_path)
    with pytest.warns(MultigraftWarning, match="another one is made, as in PEFT"):
        PeftModel.from_pretrained(net(), tmp_path)


@pytest.mark.parametrize("init", EXACT)
def test_a_state_without_where_it_began_fills_an_adapter_made_on_meta(init: str) -> None:
    model = train(ours(init))
    state = multigraft.get_peft_model_state_dict(model)
    theirs_alone = {key: value for key, value in state.items() if "initial" not in key}
    assert len(theirs_alone) == len(state) / 2
    base = multigraft.inject_adapter_in_model(
        LoraConfig(**options(init)), net(), low_cpu_mem_usage=True
    )
    multigraft.set_peft_model_state_dict(base, theirs_alone, low_cpu_mem_usage=True)
    assert off(base(batch()), model(batch())) < 1e-5


def test_loading_over_an_adapter_of_another_scale_derives_what_is_taken_out(tmp_path: Path) -> None:
    other = train(theirs("pissa", lora_alpha=12))
    other.save_pretrained(tmp_path)
    model = ours("pissa", lora_alpha=3)
    model.load_adapter(tmp_path, "default")
    assert off(model(batch()), other(batch())) < 1e-5


def test_several_stand_side_by_side_each_with_its_own_part_taken_out() -> None:
    x = batch(4)
    model = train(ours("pissa"), seed=1)
    model.add_adapter("olora", LoraConfig(**options("olora", r=3)))
    model.add_adapter("plain", LoraConfig(**options(True)))
    model.base_model.set_adapter(["default", "olora", "plain"])
    train(model, seed=2)
    alone = {}
    for name in ("default", "olora", "plain"):
        model.set_adapter(name)
        alone[name] = model(x)
    names = ["olora", "__base__", "plain", "default"]
    mixed = model(x, adapter_names=names)
    alone["__base__"] = net()(x)
    for row, name in enumerate(names):
        assert off(mixed[row], alone[name][row]) < 1e-5
    one = get_peft_model(net(), LoraConfig(**options("olora", r=3)), "olora").eval()
    state = multigraft.get_peft_model_state_dict(model, adapter_name="olora")
    multigraft.set_peft_model_state_dict(one, state, "olora")
    assert off(one(x), alone["olora"]) < 1e-5


def test_pissa_under_velora_trains_as_in_peft_and_an_alora_waits_with_its_part() -> None:
    """One step: VeLoRA's estimate of the gradient of A, of the same activations."""
    velora = {"velora_config": {"num_groups": 4, "init_type": "batch_average"}}
    mine, other = ours("pissa", **velora).train(), theirs("pissa", **velora).train()
    for model in (mine, other):
        model(batch()).square().sum().backward()
    for path in ("first", "second"):
        layers = [m.get_base_model().get_submodule(path) for m in (mine, other)]
        for name in ("lora_A", "lora_B"):
            a, b = (getattr(layer, name)["default"].weight.grad for layer in layers)
            assert off(a, b) < 1e-4
    alora = {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}
    graft = next(g for _, g in ours("pissa", **alora).roster.grafts("default"))
    assert not graft.method.delta(graft.params).any()


def test_they_combine_with_one_another_by_what_they_add() -> None:
    model = train(ours("pissa"), seed=1)
    model.add_adapter("other", LoraConfig(**options("olora", r=3)))
    model.set_adapter("other")
    train(model, seed=2)
    added = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        added[name] = first_adds(model)
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both", "cat")
    model.set_adapter("both")
    assert model.peft_config["both"].init_lora_weights is True
    assert off(first_adds(model), 0.7 * added["default"] - 0.4 * added["other"]) < 1e-5


def first_adds(model: Any) -> torch.Tensor:
    """What the active adapter adds to the first layer's output."""
    layer = model.get_base_model().first
    return layer(batch()) - layer.base_layer(batch())


def test_scaling_scales_what_is_added_so_that_zero_is_the_base() -> None:
    model, x = train(ours("pissa")), batch()
    for path in ("first", "second"):
        model.get_base_model().get_submodule(path).set_scale("default", 0.0)
    assert torch.equal(model(x), net()(x))


def test_the_rank_is_held_to_the_layers_smaller_size() -> None:
    base = net()
    before = fingerprint(base)
    with pytest.raises(TargetError, match=r"first: the rank \(=13\) must be at most 12"):
        get_peft_model(base, LoraConfig(**options("pissa", r=13)))
    assert fingerprint(base) == before


def test_a_scaling_that_cannot_be_divided_by_is_refused() -> None:
    with pytest.raises(TargetError, match=r"divides by the scaling \(=0\); choose a positive"):
        get_peft_model(net(), LoraConfig(**options("olora", lora_alpha=0)))


@pytest.mark.parametrize("init", [*EXACT, "orthogonal", "corda", "loftq"])
def test_layers_that_are_no_matrix_are_refused_with_what_to_do(init: str) -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    with pytest.raises(TargetError, match="for linear layers, not for conv; leave this layer"):
        get_peft_model(base, config)


def test_convolutions_begin_as_plain_lora_under_lora_ga_as_in_peft() -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga"))
    assert set(multigraft.get_peft_model_state_dict(model)) == {
        "base_model.model.0.lora_A.weight",
        "base_model.model.0.lora_B.weight",
    }


@pytest.mark.parametrize("init", [*EXACT, "orthogonal"])
def test_embeddings_among_the_targets_begin_as_plain_lora_as_in_peft(
    init: str, tmp_path: Path
) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Embedding(10, 16), net()
        return nn.Sequential(*layers).requires_grad_(False).eval()

    given = options(init, target_modules=["0", "first"])
    ids = torch.arange(10)
    model = get_peft_model(base(), LoraConfig(**given)).eval()
    assert off(model(ids), base()(ids)) < 1e-6
    assert not factors_of_lookup(model)[0].any()
    with quiet():
        other = peft.get_peft_model(base(), peft.LoraConfig(**given)).eval()
    assert not factors_of_lookup(other)[0].any()
    train(other).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert off(again(ids), other(ids)) < 1e-5


def factors_of_lookup(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B at the embedding."""
    layer = model.get_base_model().get_submodule("0")
    return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]


def test_variants_that_do_not_know_of_it_are_refused() -> None:
    blocks = {"nblocks": 2, "target_modules_bd_a": ["first", "second"]}
    with pytest.raises(TargetError, match=r"takes a part out of the base, which .* leave one"):
        get_peft_model(net(), LoraConfig(**options("pissa", use_bdlora=blocks)))
