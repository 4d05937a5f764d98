"""Condition numbers choose the targets that PEFT's choose, and read every base."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from multigraft import LoraConfig, find_kappa_target_modules, get_peft_model
from multigraft.kappa import KappaTuneSelector
from tests.oracle import build, llama

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))


@pytest.mark.parametrize("maker", [llama, mixtral])
@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_targets_are_pefts(maker: Any, share: float) -> None:
    model = build(maker)
    found = find_kappa_target_modules(model, top_p=share, show_progress=False)
    theirs = peft.find_kappa_target_modules(model, top_p=share, show_progress=False)
    assert found == theirs
    assert found["target_modules"]
    assert (found["target_parameters"] is None) == (maker is llama)


@pytest.mark.parametrize("more", [{}, {"num_modules": 3}, {"threshold": 8.0}], ids=str)
def test_selections_are_pefts(more: dict[str, Any]) -> None:
    model = build(mixtral)
    ours = KappaTuneSelector(model, show_progress=False)
    theirs = peft.helpers.KappaTuneSelector(model, show_progress=False)
    assert ours.get_best_targets(**more) == theirs.get_best_targets(**more)
    own, other = (s.get_best_target_parameters(**more) for s in (ours, theirs))
    assert own == other


def test_what_is_found_can_be_adapted() -> None:
    model = build(mixtral)
    model = get_peft_model(
        model, LoraConfig(r=2, **find_kappa_target_modules(model, show_progress=False))
    )
    assert len(model.base_model.layers()) > 1


def test_adapters_do_not_count() -> None:
    model = build(llama)
    plain = KappaTuneSelector(model, show_progress=False).get_best_targets()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert KappaTuneSelector(adapted, show_progress=False).get_best_targets() == plain


def test_longer_weights_are_left_out() -> None:
    selector = KappaTuneSelector(build(llama), max_dim_size_to_analyze=16, show_progress=False)
    names = selector.get_best_targets()
    assert {n.rpartition(".")[2] for n in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_names_of_experts_can_be_given() -> None:
    selector = KappaTuneSelector(
        build(mixtral), moe_param_suffixes=[".gate_up_proj"], show_progress=False
    )
    names = selector.get_best_target_parameters()
    assert len(names) == 2 and all(n.endswith("gate_up_proj") for n in names)


def test_the_best_conditioned_come_first() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    with torch.no_grad():
        for layer, small in zip(net, (0.1, 1.0, 0.5), strict=True):
            layer.weight.copy_(torch.diag(torch.tensor([1.0, small])))
    selector = KappaTuneSelector(net, show_progress=False)
    assert selector.get_best_targets() == ["1", "2", "0"]
    assert selector.get_best_targets(threshold=2.5) == ["1", "2"]


def test_weights_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = KappaTuneSelector(build(llama), show_progress=False)
    first = selector.get_best_targets()
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    assert selector.get_best_targets(num_modules=2) == first[:2]


def test_a_bar_is_shown_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    KappaTuneSelector(build(llama)).get_best_targets()
    assert "Condition numbers of layers" in capsys.readouterr().err
