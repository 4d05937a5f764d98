"""IA3's vectors add up, as in PEFT where every adapter acts on the same layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from multigraft import ConfigError, MergeError, UnsupportedError
from tests.laws import fingerprint
from tests.oracle import Pair, add_to_both, graft_pair, llama, our_config, quiet

CONFIG = {
    "kind": "IA3Config",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def pair(*configs: dict[str, Any]) -> Pair:
    made = graft_pair(llama, configs[0], adapter="a")
    for name, config in zip("bc", configs[1:], strict=False):
        add_to_both(made, name, config, seed=ord(name))
    return made


def vectors(model: Any, adapter: str) -> dict[str, Tensor]:
    return {
        layer.path: graft.params["ia3_l"].detach() for layer, graft in model.roster.grafts(adapter)
    }


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.5, -0.4], [0.0, 1.0]])
def test_outputs_are_pefts(weights: list[float]) -> None:
    made = pair(CONFIG, CONFIG)
    with quiet():
        made.theirs.base_model.add_weighted_adapter(["a", "b"], weights, "sum")
        made.theirs.set_adapter("sum")
    made.ours.add_weighted_adapter(["a", "b"], weights, "sum")
    made.ours.set_adapter("sum")
    assert not torch.allclose(*(made.outputs()[0], pair(CONFIG).outputs()[0]), atol=1e-3)
    made.assert_equal()
    config = made.theirs.peft_config["sum"]
    assert set(made.ours.peft_config["sum"].target_modules) == set(config.target_modules)
    assert set(made.ours.peft_config["sum"].feedforward_modules) == set(config.feedforward_modules)


def test_peft_loads_the_file(tmp_path: Any) -> None:
    import peft

    from tests.oracle import build

    made = pair(CONFIG, CONFIG)
    made.ours.add_weighted_adapter(["a", "b"], [0.3, 0.6], "sum")
    made.ours.set_adapter("sum")
    made.ours.save_pretrained(tmp_path, selected_adapters=["sum"])
    with quiet():
        made.theirs = peft.PeftModel.from_pretrained(build(llama), tmp_path / "sum").eval()
    made.assert_equal()


def test_an_adapter_counts_as_one_where_it_does_not_act() -> None:
    made = pair(CONFIG, {**CONFIG, "target_modules": ["k_proj"], "feedforward_modules": []})
    made.ours.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum")
    a, b, total = (vectors(made.ours, name) for name in ("a", "b", "sum"))
    assert total.keys() == a.keys()
    for path, vector in total.items():
        torch.testing.assert_close(vector, 0.25 * a[path] + 0.75 * b.get(path, torch.ones(())))


def test_expressions_are_united() -> None:
    first = {**CONFIG, "target_modules": ".*v_proj", "feedforward_modules": []}
    second = {**CONFIG, "target_modules": ".*down_proj", "feedforward_modules": ".*down_proj"}
    made = pair(first, second)
    made.ours.add_weighted_adapter(["a", "b"], [2.0, -1.0], "sum")
    a, b, total = (vectors(made.ours, name) for name in ("a", "b", "sum"))
    assert total.keys() == a.keys() | b.keys()
    one = torch.ones(())
    for path, vector in total.items():
        torch.testing.assert_close(vector, 2 * a.get(path, one) - b.get(path, one))


def test_saved_modules_change_by_the_weighted_sum_of_their_changes() -> None:
    made = pair({**CONFIG, "modules_to_save": ["lm_head"]}, CONFIG)
    made.ours.add_weighted_adapter(["a", "b"], [0.5, 1.0], "sum")
    head = made.ours.get_base_model().lm_head
    own, a, total = (
        head.base_layer.weight,
        *(head.modules_to_save[name].weight for name in ("a", "sum")),
    )
    torch.testing.assert_close(total, own + 0.5 * (a - own))


def test_it_starts_inactive_and_frozen() -> None:
    made = pair(CONFIG)
    made.ours.add_weighted_adapter(["a"], [2.0], "twice", "linear")
    assert made.ours.active_adapters == ["a"]
    assert not any(p.requires_grad for p in made.ours.roster.parameters("twice"))


def test_what_cannot_be_is_refused_and_nothing_changes() -> None:
    other = {**CONFIG, "feedforward_modules": []}
    made = pair(CONFIG)
    made.ours.add_adapter("b", our_config(other))
    made.ours.add_adapter("lora", our_config({"target_modules": ["q_proj"]}))
    before = fingerprint(made.ours)

    def refused(error: type[Exception], text: str, names: list[str], *more: Any) -> None:
        with pytest.raises(error, match=text):
            made.ours.add_weighted_adapter(names, *more)
        assert fingerprint(made.ours) == before

    refused(ConfigError, "one of LoRA's; IA3's", ["a"], [1.0], "sum", "ties")
    refused(ConfigError, "one number for each", ["a"], [1.0, 2.0], "sum")
    refused(UnsupportedError, "is a feed-forward module for some", ["a", "b"], [1.0, 1.0], "sum")
    refused(UnsupportedError, "is a IA3; only LoRA", ["lora", "a"], [1.0, 1.0], "sum")
    refused(MergeError, "NaN or infinite in `ia3_l`", ["a", "a"], [3e38, 3e38], "sum")
