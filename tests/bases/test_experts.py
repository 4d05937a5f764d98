"""Fused experts and other parameters that are targeted by name, beside PEFT and by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import multigraft
from multigraft import (
    ConfigError,
    LoraConfig,
    MultigraftWarning,
    RoutingError,
    TargetError,
    get_peft_model,
)
from tests import oracle
from tests.bases import nets
from tests.bases.nets import MIXTURES, PREFIX, Stacked, both, fill, gradients, loaded, seeded
from tests.laws import adapted_paths, assert_side_by_side, bits_of, fingerprint

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
SUBSETS = {"both": [UP, DOWN], "reversed": [DOWN, UP], "one": [DOWN]}
X = torch.linspace(-2, 2, 24).view(4, 6)

mixture = pytest.mark.parametrize("name", MIXTURES)
subset = pytest.mark.parametrize("which", SUBSETS)


def options(wanted: list[str], **more: Any) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": wanted, "r": 2, "lora_alpha": 6, **more}


def adapted(wanted: list[str] | None = None, **more: Any) -> Any:
    """Our adapter on `Stacked`, with random values."""
    config = LoraConfig(**options(wanted or ["experts.up", "experts.down", "experts.mix"], **more))
    model = get_peft_model(seeded(Stacked), config)
    fill(model)
    return model.eval()


# -- as PEFT has it ----------------------------------------------------------------------------


@mixture
@subset
def test_outputs_and_gradients_are_pefts(name: str, which: str) -> None:
    ours, theirs = both(MIXTURES[name], options(SUBSETS[which]))
    y, expected = ours(**nets.ids())[0], theirs(**nets.ids())[0]
    with ours.disable_adapter():
        assert (y - ours(**nets.ids())[0]).abs().max() > 0.01
    torch.testing.assert_close(y, expected)
    grads, theirs_grads = gradients(ours, y), gradients(theirs, expected)
    assert grads.keys() == theirs_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, theirs_grads[key], msg=key)


@mixture
@subset
def test_files_go_both_ways(name: str, which: str, tmp_path: Path) -> None:
    ours, theirs = both(MIXTURES[name], options(SUBSETS[which]))
    y = ours(**nets.ids())[0]
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(loaded(MIXTURES[name], tmp_path / "ours", peft)(**nets.ids())[0], y)
    back = loaded(MIXTURES[name], tmp_path / "theirs", multigraft)
    torch.testing.assert_close(back(**nets.ids())[0], y)
    saved = [
        json.loads((tmp_path / p / "adapter_config.json").read_text()) for p in ("ours", "theirs")
    ]
    assert sorted(saved[0]["target_parameters"]) == sorted(saved[1]["target_parameters"])
    assert saved[0]["target_modules"] == saved[1]["target_modules"] == []


@mixture
def test_merging_gives_the_forward_and_pefts_weights(name: str) -> None:
    ours, theirs = both(MIXTURES[name], options(SUBSETS["both"]))
    y = ours(**nets.ids())[0]
    ours.merge_adapter()
    torch.testing.assert_close(ours(**nets.ids())[0], y)
    merged = dict(ours.merge_and_unload().named_parameters())
    for key, value in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[key], value, msg=key)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_reads_the_adapted_stacks(implementation: str) -> None:
    ours, _ = both(MIXTURES["qwen3_moe"], options(SUBSETS["both"]))
    y = ours(**nets.ids())[0]
    ours.get_base_model().set_experts_implementation(implementation)
    torch.testing.assert_close(ours(**nets.ids())[0], y)


def test_patterns_name_parameters_and_layers_beside_them_are_adapted_too() -> None:
    more = {"rank_pattern": {"gate_up_proj": 3, "0.self_attn.q_proj": 5}, "use_rslora": True}
    more |= {"alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 1}}
    given = options([UP, DOWN], **more) | {"target_modules": ["q_proj"]}
    ours, theirs = both(MIXTURES["mixtral"], given)
    torch.testing.assert_close(ours(**nets.ids())[0], theirs(**nets.ids())[0])


@pytest.mark.parametrize("wanted", [None, []])
def test_without_target_modules_an_unknown_architecture_has_only_its_parameters(
    wanted: Any,
) -> None:
    given = options(["experts.up"]) | {"target_modules": wanted}
    ours, theirs = both(Stacked, given)
    torch.testing.assert_close(ours(X), theirs(X))
    assert ours.peft_config["default"].target_modules == wanted


@pytest.mark.parametrize(
    ("maker", "wanted"), [(nets.mixtral, UP), (nets.gpt_oss, UP), (oracle.llama, "up_proj.weight")]
)
def test_without_target_modules_an_architecture_has_the_usual_ones_where_peft_adds_them(
    maker: Any, wanted: str
) -> None:
    ours, theirs = both(maker, options([wanted]) | {"target_modules": None})
    torch.testing.assert_close(ours(**nets.ids())[0], theirs(**nets.ids())[0])


@pytest.mark.parametrize("turned", [False, True])
def test_plain_matrices_and_stacks_in_one_module_are_pefts(turned: bool, tmp_path: Path) -> None:
    maker = lambda: Stacked(turned)  # noqa: E731
    ours, theirs = both(maker, options(["experts.up", "experts.mix", "down", "head.weight"]))
    torch.testing.assert_close(ours(X), theirs(X))
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(loaded(maker, tmp_path, peft)(X), ours(X))


# -- by itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_each_expert_has_its_own_update(turned: bool, experts: int) -> None:
    base = seeded(lambda: Stacked(turned, experts))
    own = base.experts.up.detach().clone()
    model = get_peft_model(base, LoraConfig(**options(["experts.up"])))
    state = fill(model)
    a, b = state["experts.lora_A.weight"], state["experts.lora_B.weight"]
    for e in range(experts):
        update = 3 * sum(torch.outer(b[:, r * experts + e], a[e * 2 + r]) for r in range(2))
        own[e] += update.T if turned else update
    model.merge_adapter()
    torch.testing.assert_close(base.experts.up.detach(), own)


def test_gradients_are_those_of_the_forward() -> None:
    base = seeded(Stacked).double()
    model = get_peft_model(base, LoraConfig(**options(["up", "down", "mix"])))
    fill(model)
    tensors = [p for p in model.parameters() if p.requires_grad]
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *tensors))


def test_several_parameters_of_a_module_are_sites_of_one_adapted_layer() -> None:
    model = adapted()
    model.add_adapter("b", LoraConfig(target_modules="all-linear"))
    base = model.get_base_model()
    assert_side_by_side(base, seeded(Stacked))
    assert adapted_paths(base) == ["before", "experts", "head"]
    (stack,) = [x for x in nets.wrappers(base) if x.path == "experts"]
    assert {str(g.site) for g in stack.grafts["default"]} == {
        "experts.up",
        "experts.down",
        "experts.mix",
    }
    assert list(stack.grafts) == ["default"]


def test_adapters_with_other_parameters_stand_side_by_side() -> None:
    model = adapted(["experts.up", "experts.down"])
    alone = {"default": model(X)}
    for name, wanted in {"b": ["experts.down", "experts.mix"], "c": ["experts.mix"]}.items():
        model.add_adapter(name, LoraConfig(**options(wanted)))
        fill(model, name, seed=len(name) + ord(name))
        model.set_adapter(name)
        alone[name] = model(X)
    for name, y in alone.items():
        model.set_adapter(name)
        assert torch.equal(model(X), y)
    model.set_adapter(["default", "b", "c"])
    base = model.get_base_model()
    own = {n: p.detach().clone() for n, p in base.experts.base_layer.named_parameters()}
    total = dict(own)
    for name in alone:
        model.merge_adapter(adapter_names=[name])
        for key, p in base.experts.base_layer.named_parameters():
            total[key] = total[key] + p.detach() - own[key]
        model.unmerge_adapter()
    y = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    for key, p in base.experts.base_layer.named_parameters():
        torch.testing.assert_close(p.detach(), total[key])


def test_unmerging_and_deleting_give_the_bits_back() -> None:
    base = seeded(Stacked)
    before = fingerprint(base)
    model = get_peft_model(base, LoraConfig(**options(["experts.up", "experts.mix"])))
    fill(model)
    model.add_adapter("b", LoraConfig(**options(["experts.up"])))
    fill(model, "b", seed=5)
    own = {key: bits_of(p) for key, p in base.experts.base_layer.named_parameters()}
    model.merge_adapter(adapter_names=["b"])
    model.merge_adapter()
    model.unmerge_adapter(["b"])
    model.delete_adapter("default")
    model.merge_adapter()
    model.unmerge_adapter()
    assert own == {key: bits_of(p) for key, p in base.experts.base_layer.named_parameters()}
    model.delete_adapter("b")
    assert fingerprint(base) == before


def test_disabling_gives_the_base_bit_for_bit_also_while_merged() -> None:
    base_y = seeded(Stacked).requires_grad_(False)(X)
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(model(X), base_y)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), base_y)


def test_loading_over_an_adapter_takes_the_files_values(tmp_path: Path) -> None:
    model = adapted()
    y = model(X)
    model.save_pretrained(tmp_path)
    fill(model, seed=9)
    assert not torch.allclose(model(X), y)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(X), y)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(model(X), y)


def test_a_parent_that_reads_the_parameter_sees_the_adapted_one() -> None:
    model = adapted()
    base = model.get_base_model()
    shown = base.experts.up
    assert not torch.equal(shown, base.experts.base_layer.up)
    model.merge_adapter()
    torch.testing.assert_close(base.experts.up, shown)
    with model.disable_adapter():
        assert torch.equal(base.experts.up, seeded(Stacked).experts.up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_float32_adapters_and_run_in_their_own_dtype(
    dtype: torch.dtype,
) -> None:
    model = get_peft_model(seeded(Stacked).to(dtype), LoraConfig(**options(["up", "down", "mix"])))
    fill(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    y = model(X.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), adapted()(X), atol=0.05 * y.abs().max().item(), rtol=0.1)


def test_autocast_does_not_round_the_update() -> None:
    model = adapted(["experts.mix"])
    shown = model.get_base_model().experts.mix
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.get_base_model().experts.mix, shown)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_beside_parameters_are_named_as_in_pefts_files(bias: str) -> None:
    ours, theirs = both(MIXTURES["gpt_oss"], options(["router.weight", UP], bias=bias))
    torch.testing.assert_close(ours(**nets.ids())[0], theirs(**nets.ids())[0])
    keys = {k.removeprefix(PREFIX) for k in multigraft.get_peft_model_state_dict(ours)}
    assert "model.layers.0.mlp.router.base_layer.bias" in keys


def test_rows_of_a_batch_have_routers_of_their_own_but_not_sorted_experts() -> None:
    model = adapted(["head.weight"])
    names = ["default", "__base__", "default", "__base__"]
    y = model(X)
    with model.disable_adapter():
        base_y = model(X)
    torch.testing.assert_close(
        model(X, adapter_names=names),
        torch.where(torch.tensor([[True], [False], [True], [False]]), y, base_y),
    )
    model.add_adapter("stack", LoraConfig(**options(["experts.up"])))
    with pytest.raises(RoutingError, match=r"`stack` acts on experts\.up"):
        model(X, adapter_names=["stack"] * 4)


# -- what is refused ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)


class Odd(nn.Module):
    """Parameters that cannot be adapted, one of a kind."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.randn(4, 4))
        self.block = Block()
        self.norm = nn.LayerNorm(4)
        self.lin = parametrizations.weight_norm(nn.Linear(4, 4))
        self.packed = nn.Linear(4, 4)
        self.packed.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), False)


REFUSED = {
    "typo": (["blok.gate"], "no parameter of a module is called `blok.gate`"),
    "of the model itself": (["top"], "no parameter of a module is called `top`"),
    "beside layers": (["block.gate"], r"holds layers of its own \(inner\)"),
    "one dimension": (["norm.weight"], r"its shape is \(4,\)"),
    "computed": (["lin.weight"], "not a plain parameter"),
    "packed": (["packed.weight"], "reads it as it is stored"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_parameter_that_cannot_be_adapted_is_refused_by_name(case: str) -> None:
    base = Odd()
    before, (wanted, message) = fingerprint(base), REFUSED[case]
    with pytest.raises(TargetError, match=message):
        get_peft_model(base, LoraConfig(**options(wanted)))
    assert fingerprint(base) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_options_that_parameters_cannot_have_are_refused(more: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        get_peft_model(Stacked(), LoraConfig(**options(["experts.up"], **more)))


def test_a_weight_is_not_adapted_twice_by_one_adapter() -> None:
    config = options(["head.weight"]) | {"target_modules": ["head"]}
    with pytest.raises(TargetError, match=r"head\.weight, which `target_modules` means as well"):
        get_peft_model(Stacked(), LoraConfig(**config))


def test_target_parameters_must_be_a_list() -> None:
    with pytest.raises(ConfigError, match="must be a list of names"):
        LoraConfig(target_parameters="experts.up")


def test_a_file_that_names_parameters_which_are_not_there_warns_and_takes_the_others() -> None:
    tuner = get_peft_model(Stacked(), LoraConfig(**options(["mix"]))).base_model
    config = LoraConfig(**options(["experts.up", "experts.upp"]))
    with pytest.warns(MultigraftWarning, match=r"called `experts\.upp`\. Nearest"):
        tuner.add_adapter("b", config, lenient=True)
    assert isinstance(tuner.model.experts.lora_A["b"].weight, Tensor)
