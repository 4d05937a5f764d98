"""Block-diagonal LoRA against PEFT, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import BdLoraConfig, ConfigError, LoraConfig, TargetError
from tests.laws import fingerprint
from tests.methods.against_peft import Case, DropsLikePeft
from tests.oracle import quiet

A = {"target_modules_bd_a": ["layer"], "nblocks": 2}
B = {"target_modules_bd_b": ["layer"], "nblocks": 4}
SHARED: dict[str, Any] = {"r": 4, "lora_alpha": 6}


def blocks(**options: Any) -> dict[str, Any]:
    return SHARED | {"use_bdlora": options}


class TestBdLora(DropsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "blocks of A": Case("linear", blocks(**A)),
        "blocks of B": Case("linear", blocks(**B)),
        "one block": Case("linear", blocks(target_modules_bd_a=["layer"])),
        "no block": Case("linear", blocks(target_modules_bd_a=["other"], match_strict=False)),
        "two axes": Case("linear wide", blocks(target_modules_bd_b=["layer"], nblocks=2)),
        "rsLoRA": Case("linear", blocks(**A) | {"use_rslora": True}),
        "dropout in evaluation": Case("linear", blocks(**A) | {"lora_dropout": 0.5}),
    }
    dropping: ClassVar = {"linear": Case("linear", blocks(**A) | {"lora_dropout": 0.5})}


class Net(nn.Module):
    """Two layers under paths of two components."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(8, 12), "o_proj": nn.Linear(12, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., 8)`` to ``(..., 8)``."""
        return self.attn["o_proj"](self.attn["q_proj"](x).tanh())


def config(**options: Any) -> LoraConfig:
    bd = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    return LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], use_bdlora=BdLoraConfig(**(bd | options))
    )


def test_each_factor_holds_its_blocks_alone() -> None:
    state = multigraft.get_peft_model_state_dict(multigraft.get_peft_model(Net(), config()))
    shapes = {k.removeprefix("base_model.model.attn."): tuple(v.shape) for k, v in state.items()}
    assert shapes == {
        "q_proj.lora_A.weight": (4, 8),
        "q_proj.lora_B.weight": (12, 2),
        "o_proj.lora_A.weight": (4, 6),
        "o_proj.lora_B.weight": (8, 4),
    }


def test_a_layer_is_named_by_any_part_of_its_path() -> None:
    both = {"target_modules_bd_a": ["attn.o"], "target_modules_bd_b": ["attn.q"], "nblocks": 2}
    ours = multigraft.get_peft_model(Net(), config(**both))
    with quiet():
        options = peft.BdLoraConfig(**both)
        theirs = peft.get_peft_model(
            Net(), peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_bdlora=options)
        )
        expected = peft.get_peft_model_state_dict(theirs)
    found = multigraft.get_peft_model_state_dict(ours)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_blocks_of_a_begin_as_wide_as_in_peft() -> None:
    bound = (6 / 3000) ** 0.5
    net = nn.Sequential(nn.Linear(6000, 4))
    torch.manual_seed(0)
    options = LoraConfig(
        r=2, target_modules=["0"], use_bdlora={"target_modules_bd_a": ["0"], "nblocks": 2}
    )
    state = multigraft.get_peft_model_state_dict(multigraft.get_peft_model(net, options))
    largest = state["base_model.model.0.lora_A.weight"].abs().max()
    assert 0.99 * bound < largest <= bound
    assert not state["base_model.model.0.lora_B.weight"].any()


def test_other_starts_are_those_of_lora() -> None:
    net = nn.Sequential(nn.Linear(6000, 4))
    blocked = {"target_modules_bd_a": ["0"], "nblocks": 2}
    options = LoraConfig(
        r=2, target_modules=["0"], init_lora_weights="gaussian", use_bdlora=blocked
    )
    torch.manual_seed(0)
    state = multigraft.get_peft_model_state_dict(multigraft.get_peft_model(net, options))
    assert state["base_model.model.0.lora_A.weight"].std().item() == pytest.approx(0.5, rel=0.05)


def test_a_bias_of_b_stays_in_a_merge() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 8)
    model = multigraft.get_peft_model(
        net,
        LoraConfig(
            r=4,
            target_modules=["o_proj"],
            lora_bias=True,
            use_bdlora={"target_modules_bd_a": ["o"]},
        ),
    )
    with torch.no_grad():
        for parameter in model.roster.parameters("default"):
            parameter.normal_()
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules_bd_a": ["proj"]}, "both .* hold a part of its path"),
        ({"target_modules_bd_a": ["mlp"]}, "neither .* set `match_strict` to False"),
        ({"nblocks": 3}, r"`nblocks` \(=3\) .* must divide the rank \(=4\)"),
        ({"nblocks": 16}, r"`nblocks` \(=16\) .* must divide"),
    ],
)
def test_what_does_not_fit_the_layer_is_refused(options: dict[str, Any], message: str) -> None:
    net = Net()
    before = fingerprint(net)
    with pytest.raises(TargetError, match=message):
        multigraft.get_peft_model(net, config(**options))
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True}, "`lora_bias` has no place in the file of a block-diagonal B"),
        ({"init_lora_weights": "orthogonal"}, "set `init_lora_weights` to True"),
    ],
)
def test_options_that_exclude_it_are_refused(options: dict[str, Any], message: str) -> None:
    blocked = {"target_modules_bd_b": ["q_proj"], "nblocks": 2}
    with pytest.raises(TargetError, match=message):
        multigraft.get_peft_model(
            Net(), LoraConfig(r=4, target_modules=["q_proj"], use_bdlora=blocked, **options)
        )


@pytest.mark.parametrize("layer", [nn.Embedding(8, 8), nn.Conv1d(8, 8, 1)], ids=["words", "conv"])
def test_layers_that_are_no_matrices_are_refused(layer: nn.Module) -> None:
    options = LoraConfig(r=4, target_modules=["0"], use_bdlora={"target_modules_bd_a": ["0"]})
    with pytest.raises(TargetError, match="`use_bdlora` is for linear layers"):
        multigraft.get_peft_model(nn.Sequential(layer), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nblocks": 0}, r"`nblocks` \(=0\) must be an integer of at least 1"),
        ({"nblocks": True}, "must be an integer"),
        ({"target_modules_bd_a": "q_proj"}, "must be a list of names"),
        ({"match_strict": "yes"}, "must be True or False"),
        ({"target_modules_bd_b": ["o_proj"]}, r"\(=\['o_proj'\]\) must be without the names"),
    ],
)
def test_values_outside_the_fields_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


@pytest.mark.parametrize("value", [True, "yes", {"blocks": 2}])
def test_what_is_no_config_of_it_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="use_bdlora"):
        LoraConfig(use_bdlora=value)
