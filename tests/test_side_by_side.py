"""Methods of every nature side by side on one model, each as if it were alone.

PEFT has `PeftMixedModel` for some of them, and cannot save it; here it is the ordinary model.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import multigraft
from multigraft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    StateError,
    TrainableTokensConfig,
    VeraConfig,
)
from tests import oracle
from tests.laws import bits_of, fingerprint
from tests.methods.against_peft import config_at, tensors_at
from tests.oracle import build, quiet

HERE: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**HERE, r=4, modules_to_save=["lm_head"]),
    "dora": LoraConfig(**HERE, r=4, use_dora=True, trainable_token_indices=[4, 9]),
    "loha": LoHaConfig(**HERE, r=2, modules_to_save=["model.norm"]),
    "lokr": LoKrConfig(**HERE, r=2),
    "vera": VeraConfig(**HERE, r=8),
    "hira": HiraConfig(**HERE, r=2),
    "ia3": IA3Config(**HERE, feedforward_modules=["down_proj"]),
    "oft": OFTConfig(**HERE, oft_block_size=4),
    "adalora": AdaLoraConfig(**HERE, init_r=3, total_step=9),
    "norms": LNTuningConfig(task_type="CAUSAL_LM"),
    "tokens": TrainableTokensConfig(token_indices=[3, 4], task_type="CAUSAL_LM"),
}
IDS = torch.tensor([[3, 4, 9, 7, 3], [5, 4, 3, 2, 8]])
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def fill(model: PeftModel, adapter: str) -> None:
    """Seeded values for one adapter, the same on every model."""
    source = torch.Generator().manual_seed(sorted(CONFIGS).index(adapter))
    state = multigraft.get_peft_model_state_dict(model, adapter_name=adapter)
    noisy = {key: 0.3 * torch.randn(state[key].shape, generator=source) for key in sorted(state)}
    multigraft.set_peft_model_state_dict(model, noisy, adapter)


@pytest.fixture
def crowd() -> PeftModel:
    """One model with an adapter of every method, all of them filled; the first is active."""
    base = build(oracle.llama)
    first, *others = CONFIGS
    model = multigraft.get_peft_model(base, CONFIGS[first], first)
    for name in others:
        model.add_adapter(name, CONFIGS[name])
    for name in CONFIGS:
        fill(model, name)
    return model.eval()


def alone(name: str) -> Tensor:
    """What this adapter gives on a model of its own."""
    model = multigraft.get_peft_model(build(oracle.llama), CONFIGS[name], name).eval()
    fill(model, name)
    return logits(model)


def logits(model: Any, *active: str) -> Tensor:
    """The model's output with these adapters active, or with those that are."""
    if active:
        model.set_adapter(list(active))
    with torch.no_grad():
        return model(IDS).logits


def test_each_gives_what_it_gives_alone(crowd: PeftModel) -> None:
    base = logits(build(oracle.llama))
    for name in CONFIGS:
        own = logits(crowd, name)
        torch.testing.assert_close(own, alone(name), **CLOSE)
        assert (own - base).abs().max() > 1e-3, f"{name} does nothing"


def test_each_saves_its_own_tensors_and_no_others(crowd: PeftModel, tmp_path: Path) -> None:
    crowd.save_pretrained(tmp_path)
    for name, config in CONFIGS.items():
        single = multigraft.get_peft_model(build(oracle.llama), config, name)
        fill(single, name)
        single.save_pretrained(tmp_path / "single")
        written, expected = (tensors_at(d / name) for d in (tmp_path, tmp_path / "single"))
        assert sorted(written) == sorted(expected)
        assert all(torch.equal(written[key], expected[key]) for key in written)
        assert config_at(tmp_path / name) == config_at(tmp_path / "single" / name)


def test_the_whole_crowd_is_loaded_again(crowd: PeftModel, tmp_path: Path) -> None:
    crowd.save_pretrained(tmp_path)
    first, *others = CONFIGS
    model = PeftModel.from_pretrained(build(oracle.llama), tmp_path / first, first).eval()
    for name in others:
        model.load_adapter(tmp_path / name, name)
    for name in CONFIGS:
        torch.testing.assert_close(logits(model, name), logits(crowd, name), **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_each_of_them(crowd: PeftModel, name: str, tmp_path: Path) -> None:
    crowd.save_pretrained(tmp_path, selected_adapters=[name])
    with quiet():
        there = peft.PeftModel.from_pretrained(build(oracle.llama), tmp_path / name).eval()
    torch.testing.assert_close(logits(there), logits(crowd, name), **CLOSE)


def contributions(model: PeftModel, names: list[str]) -> Tensor:
    """The base's output at one layer, plus what each of these additive adapters adds alone."""
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    total = layer.base_layer(x)
    for name in names:
        model.set_adapter(name)
        total = total + layer(x) - layer.base_layer(x)
    model.set_adapter(names)
    torch.testing.assert_close(layer(x), total, **CLOSE)
    return total


def test_additive_methods_add_up_whatever_their_kind(crowd: PeftModel) -> None:
    additive = ["lora", "dora", "lokr", "vera", "hira", "adalora"]
    for pair in itertools.combinations(additive, 2):
        contributions(crowd, list(pair))
    contributions(crowd, additive)


def test_the_order_of_activation_does_not_matter(crowd: PeftModel) -> None:
    names = ["lora", "ia3", "loha", "tokens"]
    expected = logits(crowd, *names)
    for order in (names[::-1], [*names[2:], *names[:2]]):
        torch.testing.assert_close(logits(crowd, *order), expected, **CLOSE)


def test_a_map_acts_on_the_base_alone(crowd: PeftModel) -> None:
    layer = crowd.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    crowd.set_adapter("ia3")
    scaled = layer(x)
    crowd.set_adapter("lora")
    added = layer(x) - layer.base_layer(x)
    crowd.set_adapter(["lora", "ia3"])
    torch.testing.assert_close(layer(x), scaled + added, **CLOSE)


@pytest.mark.parametrize("names", [["lora", "loha"], ["ia3", "lokr", "tokens"], ["oft", "norms"]])
def test_several_merge_to_what_they_compute_together(crowd: PeftModel, names: list[str]) -> None:
    before = logits(crowd, *names)
    bits = fingerprint(crowd.get_base_model()).bits
    crowd.merge_adapter(names)
    torch.testing.assert_close(logits(crowd), before, **CLOSE)
    crowd.unmerge_adapter()
    assert fingerprint(crowd.get_base_model()).bits == bits


def test_each_row_of_a_batch_has_a_method_of_its_own(crowd: PeftModel) -> None:
    names = [*CONFIGS, "__base__"]
    with torch.no_grad():
        mixed = crowd(IDS[:1].expand(len(names), -1), adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        if name == "__base__":
            expected = logits(build(oracle.llama))
        else:
            expected = logits(crowd, name)
        torch.testing.assert_close(row, expected[0], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_one_leaves_the_others_as_they_are(crowd: PeftModel, name: str) -> None:
    crowd.set_adapter(name)
    trained = [p for p in crowd.parameters() if p.requires_grad]
    own = multigraft.get_peft_model_state_dict(crowd, adapter_name=name)
    before = {n: bits_of(p) for n, p in crowd.named_parameters()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    crowd(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {n for n, p in crowd.named_parameters() if bits_of(p) != before[n]}
    by_name = dict(crowd.named_parameters())
    assert changed and {id(by_name[n]) for n in changed} <= {id(t) for t in own.values()}


def test_two_that_copy_one_module_cannot_act_at_once(crowd: PeftModel) -> None:
    with pytest.raises(StateError, match="`modules_to_save`"):
        crowd.add_adapter("second", LoraConfig(**HERE, modules_to_save=["lm_head"]))
        crowd.set_adapter(["lora", "second"])
    with pytest.raises(StateError, match="`ln_tuning_layers`, `modules_to_save`"):
        crowd.set_adapter(["loha", "norms"])


def test_deleting_them_in_any_order_gives_the_base_back() -> None:
    base = build(oracle.llama)
    before = fingerprint(base)
    names = list(CONFIGS)
    model = multigraft.get_peft_model(base, CONFIGS[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    for name in [*names[::2], *names[1::2]]:
        model.delete_adapter(name)
    assert fingerprint(base) == before
