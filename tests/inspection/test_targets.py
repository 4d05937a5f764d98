"""A dry run says what attaching would do, module by module, and in words."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import multigraft
from multigraft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TargetError,
    VeraConfig,
    get_peft_model,
    targets,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(8, 12, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def reasons(plan: multigraft.inspection.TargetPlan) -> dict[str, str]:
    return {target.path: target.reason for target in plan.modules}


SPECS = {
    "names": LoraConfig(target_modules=["up", "words"], r=2),
    "all-linear": LoraConfig(target_modules="all-linear"),
    "expression": LoraConfig(target_modules=r".*\.(up|down)"),
    "filters": LoraConfig(
        target_modules="all-linear", exclude_modules=["down"], layers_to_transform=[0, 2]
    ),
    "pattern": LoraConfig(target_modules=["up", "down"], rank_pattern={"1.up": 3}),
    "head saved": LoraConfig(target_modules=["up", "head"], modules_to_save=["head"]),
    "biases": LoraConfig(target_modules=["up"], bias="all"),
    "tokens": LoraConfig(target_modules=["up"], trainable_token_indices=[1, 5]),
    "parameter": LoraConfig(target_modules=["up"], target_parameters=["head.weight"]),
    "dora": LoraConfig(target_modules=["up"], use_dora=True),
    "norms": LNTuningConfig(target_modules=["norm"]),
    "ia3": IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "shared": VeraConfig(target_modules=["up", "down"], r=4),
    "pruned": AdaLoraConfig(target_modules=["up"], init_r=4, total_step=9),
    "oft": OFTConfig(target_modules=["up"], r=2, oft_block_size=0),
    "loha": LoHaConfig(target_modules=["up"], r=2),
    "lokr": LoKrConfig(target_modules=["up"], r=2),
}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"])
def test_a_tasks_heads_are_trained_as_they_are_when_attaching(task):
    net = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), classifier=nn.Linear(4, 2)))
    config = LoraConfig(target_modules=["body"], task_type=task)
    plan = targets(net, config)
    model = get_peft_model(copy.deepcopy(net), config)
    assert plan.parameters == model.get_nb_trainable_parameters()[0]
    is_head = task in ("SEQ_CLS", "TOKEN_CLS")
    assert (reasons(plan)["classifier"] == "`modules_to_save`: a copy of it is trained") is is_head
    assert targets(model, config).parameters == plan.parameters


@pytest.mark.parametrize("config", SPECS.values(), ids=SPECS.keys())
def test_it_counts_and_names_what_attaching_makes(net, config):
    plan = targets(net, config)
    model = get_peft_model(copy.deepcopy(net), config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert plan.fits
    assert plan.parameters == sum(p.numel() for p in trainable)
    attached = [site.path for site in multigraft.inspect(model).sites]
    assert [target.path for target in plan.chosen] == attached


def test_it_leaves_model_and_config_as_they_are(net):
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    config = LoraConfig(target_modules="all-linear")
    targets(net, config)
    assert config == LoraConfig(target_modules="all-linear")
    assert not [m for m in net.modules() if isinstance(m, multigraft.AdaptedLayer)]
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_each_module_has_its_own_reason(net):
    plan = targets(
        net,
        LoraConfig(
            target_modules=["up", "down"],
            exclude_modules=["0.up"],
            layers_to_transform=[0, 1],
            modules_to_save=["1.down"],
        ),
    )
    found = reasons(plan)
    assert found["layers.0.up"] == "`exclude_modules` leaves it out: `0.up`"
    assert found["layers.0.down"] == "its path matches `down`"
    assert found["layers.1.down"] == "`modules_to_save`: a copy of it is trained"
    assert found["layers.2.up"] == (
        "its path matches `up`, but `layers_to_transform` leaves its layer out"
    )
    assert found["layers.0.norm"] == "its path ends in none of the names"
    assert [t.path for t in plan.chosen] == ["layers.0.down", "layers.1.up", "layers.1.down"]


def test_all_linear_says_what_it_leaves_alone(net):
    found = reasons(targets(net, LoraConfig(target_modules="all-linear")))
    assert found["head"] == '"all-linear" leaves the output head alone; name it to adapt it'
    assert found["words"] == '"all-linear" means linear layers, and this is none'
    assert found["layers.0.up"] == '"all-linear": a linear layer'


def test_an_expression_that_matches_a_part_is_pointed_out(net):
    plan = targets(net, LoraConfig(target_modules=r"layers\.\d\.u"))
    assert not plan.fits
    assert reasons(plan)["layers.0.up"] == (
        "the expression does not match its path: it matches a part of it and must match the whole"
    )
    assert reasons(plan)["head"] == "the expression does not match its path"


def test_a_misspelt_name_points_at_the_module_that_it_may_mean(net):
    plan = targets(net, LoraConfig(target_modules=["up", "dwn"]))
    assert plan.problems[0].startswith("`target_modules`: no module is called `dwn`. Nearest: `do")
    found = reasons(plan)
    assert found["layers.0.down"].endswith("; did you mean it by `dwn`?")
    assert found["layers.0.norm"] == "its path ends in none of the names"
    assert [t.path for t in plan.chosen] == [f"layers.{n}.up" for n in range(3)]
    assert plan.parameters == 0  # nothing can be attached


def test_a_kind_that_cannot_be_adapted_says_so_at_the_module(net):
    plan = targets(net, LoraConfig(target_modules=["up", "norm"]))
    assert not plan.fits
    assert reasons(plan)["layers.1.norm"].startswith(
        "its path matches `norm`, but LORA cannot adapt it (LayerNorm): it adapts layers of the"
    )
    assert "layers.1.norm" not in {t.path for t in plan.chosen}


def test_a_module_named_in_full_in_a_layer_left_out_says_so(net):
    plan = targets(net, LoraConfig(target_modules=["up", "layers.1.down"], layers_to_transform=0))
    assert not plan.fits
    assert "names it in full" in reasons(plan)["layers.1.down"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["nowhere"]),
        LoraConfig(target_modules=["up"], exclude_modules=["nowhere"]),
        LoraConfig(target_modules=["up"], layers_to_transform=[7]),
        LoraConfig(target_modules=["up"], rank_pattern={"nowhere": 2}),
        LoraConfig(target_modules=["up"], modules_to_save=["nowhere"]),
        LoraConfig(target_modules=["up"], target_parameters=["nowhere"]),
        LoraConfig(),
    ],
    ids=str,
)
def test_the_problem_is_the_error_of_attaching(net, config):
    with pytest.raises(TargetError) as refusal:
        get_peft_model(net, config)
    assert targets(net, config).problems == (str(refusal.value),)


def test_a_model_with_adapters_is_its_base(net):
    config = LoraConfig(target_modules=["up"])
    fresh = targets(net, config)
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    beside = targets(model, config)
    assert (beside.modules, beside.parameters) == (fresh.modules, fresh.parameters)


def test_what_belongs_to_no_module_is_counted_apart(net):
    plan = targets(net, multigraft.PromptTuningConfig(num_virtual_tokens=3, token_dim=8))
    assert (plan.chosen, plan.elsewhere, plan.parameters) == ((), 24, 24)
    assert reasons(plan)["head"] == "PROMPT_TUNING changes what the model is given"


def test_repeats_are_folded_in_the_text(net):
    shown = str(targets(net, LoraConfig(target_modules=["up"], r=2)))
    assert shown.startswith("LORA on Net (1,080 parameters): 3 modules, 144 trainable parameters")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "✓ layers.{0..2}.up ×3 Linear 16×8 2 144 its path matches `up`" in lines


def test_everything_is_plain_data(net):
    plan = targets(net, LoraConfig(target_modules=["up"], r=2))
    data = plan.to_dict()
    assert data["parameters"] == 144
    (up,) = [m for m in data["modules"] if m["path"] == "layers.0.up"]
    assert up["parts"] == ({"method": "LORA", "tensor": "weight", "rank": 2, "parameters": 48},)
