"""What cannot be combined is refused with the reason, and the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multigraft import (
    AdapterNameError,
    ConfigError,
    IA3Config,
    LoraConfig,
    MergeError,
    MultigraftWarning,
    PeftModel,
    StateError,
    TargetError,
    UnsupportedError,
    inject_adapter_in_model,
)
from multigraft.variants.dora import DoRA
from tests.combine.nets import IDS, RULES, WEIGHTS, base, combine, options, ours, state
from tests.laws import fingerprint

TWO = (options(), options(lora_alpha=10))

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a taken name": ({"adapter_name": "b"}, AdapterNameError, "adapter `b` exists"),
    "a name that is no folder's": ({"adapter_name": "x/y"}, AdapterNameError, "names a folder"),
    "an unknown source": ({"adapters": ["a", "c"]}, AdapterNameError, "no adapter is called `c`"),
    "no source": ({"adapters": [], "weights": []}, AdapterNameError, "must be a list of names"),
    "a string": ({"adapters": "ab"}, AdapterNameError, "must be a list of names"),
    "too few weights": ({"weights": [1.0]}, ConfigError, "one number for each of the 2"),
    "a weight that is no number": ({"weights": [1.0, float("nan")]}, ConfigError, "finite"),
    "a weight of another kind": ({"weights": [1.0, "half"]}, ConfigError, "finite numbers"),
    "an unknown rule": ({"combination_type": "tie"}, UnsupportedError, "Nearest: `ties`"),
    "no density": ({"combination_type": "ties"}, ConfigError, "`ties` needs `density`"),
    "density 0": ({"combination_type": "ties", "density": 0.0}, ConfigError, "above 0"),
    "density 1.5": ({"combination_type": "dare_linear", "density": 1.5}, ConfigError, "at most 1"),
    "an unknown election": (
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "loudest"},
        ConfigError,
        "'total' or 'frequency'",
    ),
    "rank 0": ({"svd_rank": 0}, ConfigError, "at least 1"),
    "a quantile above 1": ({"svd_clamp": 99}, ConfigError, "a quantile"),
    "an unknown driver": ({"svd_driver": "fast"}, ConfigError, "gesvdj"),
}


def refused(model: Any, error: type[Exception], text: str, **arguments: Any) -> None:
    """The call raises, and leaves the model as it was."""
    before, names = fingerprint(model), list(model.peft_config)
    given = {"adapters": ["a", "b"], "weights": WEIGHTS, "adapter_name": "sum", **arguments}
    with pytest.raises(error, match=text):
        model.add_weighted_adapter(**given)
    assert fingerprint(model) == before
    assert list(model.peft_config) == names


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    arguments, error, text = BAD[case]
    refused(ours(*TWO), error, text, **arguments)


@pytest.mark.parametrize("rule", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_factors_of_different_ranks(rule: str) -> None:
    density = {} if rule == "linear" else {"density": 0.5}
    model = ours(options(), options(r=2))
    text = r"must have the same rank; at emb they are {'a': 4, 'b': 2}. Use `cat`"
    refused(model, UnsupportedError, text, combination_type=rule, **density)


def test_ranks_that_a_pattern_makes_different_at_one_layer() -> None:
    model = ours(options(), options(rank_pattern={"conv": 2}))
    refused(model, UnsupportedError, "at conv they are", combination_type="linear")


def test_another_method() -> None:
    model = ours(options())
    model.add_adapter("b", IA3Config(target_modules=["lin"], feedforward_modules=[]))
    refused(model, UnsupportedError, "`b` is a IA3; only LoRA")


def test_a_variant_that_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(options(use_dora=True), options())
    monkeypatch.setattr(DoRA, "combines", False)
    refused(model, UnsupportedError, "`a` uses LoRA's variant `dora`")


def test_a_source_without_values() -> None:
    model = ours(options())
    model.add_adapter("b", LoraConfig(target_modules=["lin"]), low_cpu_mem_usage=True)
    with pytest.raises(StateError, match="on the meta device"):
        model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    assert list(model.peft_config) == ["a", "b"]


def test_a_source_that_is_not_finite() -> None:
    model = ours(*TWO)
    with torch.no_grad():
        model.get_base_model().lin.lora_A["b"].weight[0, 0] = float("inf")
    refused(model, MergeError, "`b` holds NaN or infinity")


@pytest.mark.parametrize(
    ("rule", "text"), [("cat", "gives NaN or infinity"), ("svd", "no singular value decomposition")]
)
def test_a_result_that_is_not_finite(rule: str, text: str) -> None:
    refused(ours(*TWO), MergeError, text, weights=[3e38, -3e38], combination_type=rule)


def test_one_that_saves_what_another_adapts() -> None:
    model = ours(options(target_modules=["head"]), options(modules_to_save=["head"]))
    refused(model, UnsupportedError, "`a` adapts head, of which `b` saves a copy")


def test_a_rank_that_does_not_suit_a_layer() -> None:
    grouped = torch.nn.Conv2d(3, 6, 3, groups=3)
    model = PeftModel(torch.nn.Sequential(grouped), None)
    for name in "ab":
        model.add_adapter(name, LoraConfig(target_modules=["0"], r=3))
    refused(model, TargetError, "must be a multiple of the convolution's `groups`", svd_rank=4)


@pytest.mark.parametrize(
    ("rule", "more", "unused"),
    [
        ("linear", {"svd_rank": 3}, "`svd_rank`"),
        ("cat", {"svd_clamp": 0.9, "density": 0.5}, "`svd_clamp`, `density`"),
    ],
)
def test_options_that_a_rule_makes_no_use_of(rule: str, more: dict[str, Any], unused: str) -> None:
    with pytest.warns(MultigraftWarning, match=f"makes no use of {unused}"):
        ours(*TWO).add_weighted_adapter(["a", "b"], WEIGHTS, "sum", rule, **more)


@pytest.mark.parametrize("rule", RULES)
def test_sources_and_state_are_as_they_were(rule: str) -> None:
    model = ours(*TWO)
    before = {name: state(model, name) for name in "ab"}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    kept = {name: config.to_dict() for name, config in model.peft_config.items()}
    more = {} if rule in ("linear", "cat", "svd") else {"density": 0.5}
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", rule, **more)
    assert model.active_adapters == ["a"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    for name in "ab":
        assert model.peft_config[name].to_dict() == kept[name]
        for key, value in state(model, name).items():
            assert torch.equal(value, before[name][key]), key


def test_deleting_the_combination_leaves_no_trace() -> None:
    model = ours(*TWO)
    before = fingerprint(model)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    assert fingerprint(model) != before
    model.delete_adapter("sum")
    assert fingerprint(model) == before


def test_merged_sources_are_combined_from_their_own_tensors() -> None:
    model = ours(*TWO)
    expected = combine(ours(*TWO), "cat")(IDS)
    model.merge_adapter(["a"])
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "cat")
    model.unmerge_adapter()
    model.set_adapter("sum")
    torch.testing.assert_close(model(IDS), expected)


def test_one_adapter_may_stand_twice() -> None:
    model = ours(*TWO)
    model.add_weighted_adapter(["a", "a"], [0.5, 0.5], "sum", "cat")
    expected = model(IDS)
    model.set_adapter("sum")
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-4)
    assert model.peft_config["sum"].r == 8


def test_models_adapted_in_place_combine_at_their_tuner() -> None:
    from multigraft.tuner import Tuner

    model = base()
    inject_adapter_in_model(LoraConfig(target_modules=["lin"]), model, "a")
    Tuner(model).add_weighted_adapter(["a"], [0.5], "half", "cat")
    assert list(model.peft_config) == ["a", "half"]
