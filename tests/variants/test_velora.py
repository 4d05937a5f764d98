"""VeLoRA against PEFT: exact forwards, and A's gradient from compressed activations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import ConfigError, LoraConfig, TargetError, VeloraConfig
from tests.methods.against_peft import Case, DropsLikePeft, filled, gradients, near

OPTIONS = {"num_groups": 5, "scale": 1.7}
VELORA = {"r": 4, "lora_alpha": 6, "velora_config": OPTIONS}
EMBED = "lora_velora_embed"


class TestVelora(DropsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Case("linear", VELORA),
        "no bias": Case("linear wide", VELORA),
        "Conv1D": Case("conv1d_transposed", VELORA),
        "rsLoRA": Case("linear", VELORA | {"use_rslora": True}),
        "random": Case("linear", VELORA | {"velora_config": OPTIONS | {"init_type": "random"}}),
        "once": Case(
            "linear", VELORA | {"velora_config": OPTIONS | {"init_type": "batch_average_once"}}
        ),
        "dropout in evaluation": Case("linear", VELORA | {"lora_dropout": 0.5}),
        "bias": Case("linear", VELORA | {"lora_bias": True}),
    }
    dropping: ClassVar = {"linear": Case("linear", VELORA | {"lora_dropout": 0.5})}

    def test_gradients_in_training_agree(self, case: Case) -> None:
        """A's from compressed activations; the projection that they are compressed by, too."""
        if "lora_dropout" in case.options:
            case = Case(case.layer, {**case.options, "lora_dropout": 0.0})
        ours, theirs = self.both(case)
        exact = gradients(ours, case)
        if case.options["velora_config"].get("init_type") != "random":
            (graft,) = ours.get_base_model().layer.all_grafts()
            graft.params[
                EMBED
            ].zero_()  # as before the first batch, which PEFT counts from loading on
        for model in (ours.train(), theirs.train()):
            model.zero_grad()
        near(ours(case.model().batch()), theirs(case.model().batch()))
        first, second = gradients(ours, case), gradients(theirs, case)
        assert sorted(first) == sorted(second)
        for name, gradient in first.items():
            near(gradient, second[name], name)
            is_exact = torch.allclose(gradient, exact[name])
            assert is_exact == ("lora_A" not in name), name
        near(embed(ours), theirs.base_model.model.layer.lora_velora_embed["default"])


def embed(model: Any) -> Tensor:
    """The projection of the only adapted layer."""
    state = multigraft.get_peft_model_state_dict(model)
    (found,) = (tensor for key, tensor in state.items() if key.endswith(EMBED))
    return found


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    config = LoraConfig(r=3, target_modules=["0"], velora_config=OPTIONS | options)
    model = multigraft.get_peft_model(net, config).to(dtype)
    state = multigraft.get_peft_model_state_dict(model)
    values = {k: v for k, v in filled(state, 0.5).items() if not k.endswith(EMBED)}
    multigraft.set_peft_model_state_dict(model, state | values)
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_projection_follows_each_batch_or_the_first_or_none() -> None:
    for kind, changes in {"batch_average": 2, "batch_average_once": 1, "random": 0}.items():
        model = adapted(init_type=kind).train()
        seen = [embed(model).clone()]
        for seed in range(2):
            model(batch(seed))
            seen.append(embed(model).clone())
        assert sum(not torch.equal(a, b) for a, b in pairwise(seen)) == changes
        torch.testing.assert_close(seen[-1].norm(), torch.tensor(1.0, dtype=torch.float64))


def test_a_loaded_projection_of_the_first_batch_stays(tmp_path: Any) -> None:
    model = adapted(init_type="batch_average_once").train()
    model(batch())
    model.save_pretrained(tmp_path)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    again = multigraft.PeftModel.from_pretrained(net, tmp_path, is_trainable=True).train()
    again(batch(1))
    torch.testing.assert_close(embed(again), embed(model).float(), check_dtype=False)


def test_evaluation_leaves_the_projection_and_gives_exact_gradients() -> None:
    model = adapted().eval()
    before = embed(model).clone()
    model(batch()).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert torch.equal(embed(model), before)
    twin = adapted()
    plain = multigraft.get_peft_model(twin.unload(), LoraConfig(r=3, target_modules=["0"])).double()
    state = multigraft.get_peft_model_state_dict(model)
    state = {k: v for k, v in state.items() if not k.endswith(EMBED)}
    multigraft.set_peft_model_state_dict(plain, state)
    plain.eval()(batch()).square().sum().backward()
    for name, p in plain.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)


def test_two_forwards_before_a_backward_keep_their_own_projections() -> None:
    model = adapted().train()
    alone = []
    for seed in range(2):
        model.zero_grad()
        model(batch(seed)).square().sum().backward()
        alone.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    first, second = model(batch(0)), model(batch(1))
    (first.square().sum() + second.square().sum()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, alone[0][name] + alone[1][name])


def test_the_graph_keeps_a_summary_of_the_input_and_not_the_input() -> None:
    torch.manual_seed(0)
    model = multigraft.get_peft_model(
        nn.Sequential(nn.Linear(64, 8)),
        LoraConfig(r=2, target_modules=["0"], velora_config={"num_groups": 4}),
    ).train()
    x, kept = torch.randn(100, 64), []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    assert max(kept) < x.numel() / 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_groups", 0, "`num_groups` .* integer of at least 1"),
        ("scale", 0.0, "`scale` .* number above 0"),
        ("init_type", "mean", "`init_type` .* must be one of 'batch_average'"),
    ],
)
def test_values_that_are_not_allowed_are_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VeloraConfig(**{option: value})


def test_other_kinds_of_layers_are_refused_with_what_to_do() -> None:
    config = LoraConfig(target_modules=["0"], velora_config={})
    with pytest.raises(TargetError, match="for linear layers, not for conv; leave this layer"):
        multigraft.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), config)
