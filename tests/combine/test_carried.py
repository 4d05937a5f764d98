"""What a combination carries besides A and B: scales, magnitudes, biases, copies (T4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from multigraft import LoraConfig, UnsupportedError
from tests.combine.nets import IDS, WEIGHTS, combine, deltas, options, ours, state

WHOLE = ["linear", "cat", "svd"]
"""Rules by which one adapter of weight 1 is that adapter."""


def output(model: Any, *adapters: str) -> Tensor:
    model.set_adapter(list(adapters))
    y: Tensor = model(IDS).detach()
    return y


def near(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


CARRIED: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin": 2, "conv": 3}, "alpha_pattern": {"turned": 11}},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"target_modules": ["lin", "turned", "conv"], "lora_bias": True},
    "biases of its layers": {"target_modules": ["lin", "one"], "bias": "lora_only"},
    "all biases": {"bias": "all"},
    "saved modules": {"modules_to_save": ["head"]},
    "PiSSA": {"target_modules": ["lin", "turned"], "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": ["lin"], "init_lora_weights": "olora"},
    "DoRA and PiSSA": {"target_modules": ["lin"], "init_lora_weights": "pissa", "use_dora": True},
    "blocks": {
        "target_modules": ["lin"],
        "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["lin"]},
    },
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 5]}},
}


@pytest.mark.parametrize("rule", WHOLE)
@pytest.mark.parametrize("case", CARRIED)
def test_one_adapter_of_weight_one_is_itself(case: str, rule: str) -> None:
    model = ours(options(**CARRIED[case]))
    expected = output(model, "a")
    near(output(combine(model, rule, [1.0]), "sum"), expected)


@pytest.mark.parametrize("rule", ["cat", "svd"])
@pytest.mark.parametrize("case", CARRIED)
def test_an_adapter_of_weight_zero_is_absent(case: str, rule: str) -> None:
    model = ours(options(**CARRIED[case]), options(**CARRIED[case]))
    expected = output(model, "a")
    near(output(combine(model, rule, [1.0, 0.0]), "sum"), expected)


@pytest.mark.parametrize("case", [c for c in CARRIED if "DoRA" not in c])
def test_changes_of_the_base_add_up(case: str) -> None:
    """Every base tensor changes by the weighted sum of its changes."""
    model = ours(options(**CARRIED[case]), options(**CARRIED[case]))
    combine(model, "cat")
    base, a, b, total = (merged(model, names) for names in ([], ["a"], ["b"], ["sum"]))
    assert any(not torch.equal(base[name], total[name]) for name in base)
    for name, own in base.items():
        changes = WEIGHTS[0] * (a[name] - own) + WEIGHTS[1] * (b[name] - own)
        near(total[name], own + changes)


def merged(model: Any, adapters: list[str]) -> dict[str, Tensor]:
    """The base's tensors with these adapters merged, by name; taken out again."""
    if not adapters:
        return plain(model)
    model.set_adapter(adapters)
    model.merge_adapter()
    values = plain(model)
    model.unmerge_adapter()
    return values


def plain(model: Any) -> dict[str, Tensor]:
    return {
        name.replace("base_layer.", ""): value.detach().clone()
        for name, value in model.get_base_model().state_dict().items()
        if not any(part in name for part in ("lora_", "modules_to_save", "bias_copy", "trainable"))
    }


def test_the_result_is_a_plain_lora_of_scale_one() -> None:
    model = combine(ours(options(use_rslora=True, alpha_pattern={"lin": 3})), "cat", [1.0])
    config = model.peft_config["sum"]
    assert (config.use_rslora, config.r, config.lora_alpha) == (False, 4, 4)
    assert config.alpha_pattern == {}
    assert {layer.scaling["sum"] for layer in model.base_model.layers()} == {1.0}


def test_a_scale_that_was_set_is_carried() -> None:
    model = ours(options())
    for layer in model.base_model.layers():
        layer.set_scale("a", 2.5)
    expected = output(model, "a")
    near(output(combine(model, "cat", [1.0]), "sum"), expected)


def test_magnitudes_change_by_the_weighted_sum_of_their_changes() -> None:
    model = ours(options(use_dora=True), options(use_dora=True))
    combine(model, "cat")
    linear = model.get_base_model().lin.base_layer.weight
    own = linear.detach().norm(dim=1)
    key = "base_model.model.lin.lora_magnitude_vector"
    a, b, total = (state(model, name)[key] for name in ("a", "b", "sum"))
    near(total, own + WEIGHTS[0] * (a - own) + WEIGHTS[1] * (b - own))


@pytest.mark.parametrize(("weights", "which"), [([1.0, 0.0], "a"), ([0.0, 1.0], "b")])
def test_a_plain_adapter_beside_one_with_magnitudes(weights: list[float], which: str) -> None:
    model = ours(options(use_dora=True), options())
    expected = output(model, which)
    near(output(combine(model, "cat", weights), "sum"), expected)
    assert model.peft_config["sum"].use_dora


def test_a_module_that_one_of_them_saves_is_saved() -> None:
    model = ours(options(modules_to_save=["head"]), options())
    combine(model, "cat", [0.5, 1.0])
    key = "base_model.model.head.weight"
    own = model.get_base_model().head.base_layer.weight.detach()
    near(state(model)[key], own + 0.5 * (state(model, "a")[key] - own))


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune_svd", "dare_linear"])
def test_saved_modules_go_by_the_rule_too(rule: str) -> None:
    """Pruned to nearly nothing, they are nearly the base's."""
    model = ours(options(modules_to_save=["head"]), options(modules_to_save=["head"]))
    combine(model, rule, density=0.34)
    key = "base_model.model.head.weight"
    own = model.get_base_model().head.base_layer.weight.detach()
    is_own = torch.isclose(state(model)[key], own, atol=1e-7)
    assert 0 < int(is_own.sum()) < own.numel()


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ({"bias": "all"}, {"bias": "lora_only"}, "bias"),
        (
            {"trainable_token_indices": {"emb": [1]}},
            {"trainable_token_indices": {"emb": [2]}},
            "trainable_token_indices",
        ),
    ],
)
def test_options_that_exclude_each_other(
    first: dict[str, Any], second: dict[str, Any], field: str
) -> None:
    model = ours(*(options(target_modules=["lin"], **more) for more in (first, second)))
    with pytest.raises(UnsupportedError, match=f"different `{field}`"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    assert list(model.peft_config) == ["a", "b"]


def test_filters_that_differ_leave_each_source_its_own_sites() -> None:
    """`exclude_modules` of one source is not that of the other."""
    model = ours(
        options(target_modules=["lin", "turned"], exclude_modules=["turned"]),
        options(target_modules=["turned", "one"]),
    )
    combine(model, "cat")
    assert set(deltas(model, "sum")) == {"lin", "turned", "one"}
    for path, total in deltas(model, "sum").items():
        parts = [w * deltas(model, n)[path] for w, n in zip(WEIGHTS, "ab", strict=True)
                 if path in deltas(model, n)]  # fmt: skip
        near(total, sum(parts[1:], parts[0]))


def test_half_precision_adapters_stay_so_and_are_summed_in_float32() -> None:
    model = ours(options(target_modules=["lin"])).to(torch.bfloat16)
    combine(model, "cat", [1.0])
    assert {t.dtype for t in state(model).values()} == {torch.bfloat16}
    model.add_adapter("wide", LoraConfig(target_modules=["lin"], r=2))
    model.add_weighted_adapter(["a", "wide"], [1.0, 1.0], "both", "cat")
    assert {t.dtype for t in state(model, "both").values()} == {torch.float32}
