"""MonteCLoRA against PEFT: the same samples give the same outputs, gradients and entropies."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence
from torch.utils.checkpoint import checkpoint

import multigraft
from multigraft import ConfigError, LoraConfig, MontecloraConfig, TargetError
from multigraft.variants import monteclora
from tests import oracle
from tests.methods.against_peft import AgreesWithPeft, Case, filled, gradients
from tests.oracle import quiet

SAMPLES = 3
OPTIONS = {"num_samples": SAMPLES, "buffer_size": 2, "sample_scaler": 0.7, "kl_loss_weight": 0.01}
MONTE = {"r": 4, "lora_alpha": 6, "monteclora_config": OPTIONS}


class TestMonteclora(AgreesWithPeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Case("linear", MONTE),
        "no bias": Case("linear wide", MONTE),
        "Conv1D": Case("conv1d_transposed", MONTE),
        "rsLoRA": Case("linear", MONTE | {"use_rslora": True}),
        "dropout in evaluation": Case("linear", MONTE | {"lora_dropout": 0.5}),
        "bias": Case("linear", MONTE | {"lora_bias": True}),
    }

    def test_gradients_agree(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """In training, with the samples that PEFT has drawn ahead; so do the outputs."""
        if "lora_dropout" in case.options:
            case = Case(case.layer, {**case.options, "lora_dropout": 0.0})
        ours, theirs = self.both(case)
        share_samples(theirs, monkeypatch)
        x = case.model().batch()
        ours.train(), theirs.train()
        first = ours(x)
        close = {"atol": 1e-5, "rtol": 1e-5}  # PEFT takes its roots in float32
        torch.testing.assert_close(first, theirs(x), **close)
        assert not torch.allclose(first, ours.eval()(x)), "nothing was sampled"
        rewind(theirs)
        one, two = gradients(ours.train(), case), gradients(theirs, case)
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, two[name], **close)


def sampler(theirs: Any) -> Any:
    """PEFT's only sampler."""
    (found,) = (m for m in theirs.modules() if type(m).__name__ == "MontecloraSampler")
    return found


def rewind(theirs: Any) -> None:
    """Let PEFT use the samples that it has drawn ahead once more."""
    sampler(theirs).sampler.index = 0


def share_samples(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ours draw what PEFT draws first, again and again."""
    rewind(theirs)
    drawn = sampler(theirs).sampler.buffer[0]

    def draws(like: Tensor, samples: int, in_: int) -> tuple[Tensor, ...]:
        found = drawn["z_mvn"], drawn["z_wishart"].diag(), drawn["z_dirichlet"]
        assert found[0].shape == (samples, in_, len(like))
        return tuple(tensor.to(like) for tensor in found)

    monkeypatch.setattr(monteclora, "draws", draws)


def llama_pair(**options: Any) -> oracle.Pair:
    """A tiny language model with labels in both libraries, the same values in both adapters."""
    chosen = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = chosen | {"monteclora_config": OPTIONS | options}
    made = oracle.graft_pair(oracle.llama, config)
    made.batch["labels"] = made.batch["input_ids"]
    return made


def test_the_entropy_joins_the_loss_as_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = llama_pair(use_entropy=True, kl_loss_weight=0.0)
    pair.ours.train(), pair.theirs.train()
    samplers = [m for m in pair.theirs.modules() if type(m).__name__ == "MontecloraSampler"]
    for each in samplers:
        each.sampler.index = 0
    queue = [each.sampler.buffer[0] for each in samplers]
    calls = iter([(d["z_mvn"], d["z_wishart"].diag(), d["z_dirichlet"]) for d in queue])
    monkeypatch.setattr(monteclora, "draws", lambda *_: next(calls))
    ours = pair.ours(**pair.batch).loss
    theirs = pair.theirs(**pair.batch).loss
    with_term = theirs + pair.theirs.base_model._get_monteclora_loss()
    assert with_term > theirs + 0.1
    torch.testing.assert_close(ours, with_term)
    ours.backward()
    with_term.backward()
    oracle.assert_same_gradients(pair)


def test_evaluation_adds_nothing_to_the_loss() -> None:
    pair = llama_pair(use_entropy=True)
    torch.testing.assert_close(pair.ours(**pair.batch).loss, pair.theirs(**pair.batch).loss)


def test_the_divergences_are_those_of_the_distributions() -> None:
    torch.manual_seed(0)
    alpha = torch.rand(5, dtype=torch.float64) + 0.3
    prior = Dirichlet(torch.full_like(alpha, 0.1))
    expected = kl_divergence(Dirichlet(alpha), prior)
    torch.testing.assert_close(monteclora.dirichlet_kl(alpha, 0.1), expected)
    variance = torch.rand(4, dtype=torch.float64) + 0.1
    zero, one = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    expected = kl_divergence(
        MultivariateNormal(zero, variance.diag()), MultivariateNormal(zero, one)
    )
    torch.testing.assert_close(monteclora.normal_kl(variance), expected)
    std = torch.randn(4, dtype=torch.float64)
    scale = (2 * std).exp().diag()
    expected = kl_divergence(Wishart(torch.tensor(4.0), scale), Wishart(torch.tensor(4.0), one))
    torch.testing.assert_close(monteclora.wishart_kl(std), expected)


def test_peft_adds_a_term_of_the_dirichlets_divergence_that_is_to_be_subtracted() -> None:
    pair = llama_pair()
    found = sampler_of(pair.theirs)
    alpha = torch.tensor([0.4, 1.5, 2.0])
    prior = torch.full((3,), found.dirichlet_prior)
    excess = found.dirichlet_kl(alpha) - monteclora.dirichlet_kl(alpha, found.dirichlet_prior)
    torch.testing.assert_close(excess, 2 * (alpha.lgamma() - prior.lgamma()).sum())


def sampler_of(theirs: Any) -> Any:
    """The first of PEFT's samplers."""
    return next(m for m in theirs.modules() if type(m).__name__ == "MontecloraSampler")


def one_layer(**options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    config = LoraConfig(r=3, target_modules=["0"], monteclora_config=OPTIONS | options)
    model = multigraft.get_peft_model(net, config)
    state = multigraft.get_peft_model_state_dict(model)
    multigraft.set_peft_model_state_dict(model, filled(state, 0.5))
    return model.train()


def test_the_seed_decides_the_samples() -> None:
    model, x = one_layer(), torch.randn(4, 6)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)


def test_a_layer_that_checkpointing_runs_again_draws_the_same() -> None:
    model, x = one_layer(), torch.randn(4, 6, requires_grad=True)
    found = []
    for reentrant in (True, False, None):
        torch.manual_seed(1)
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_samples_lie_around_a_as_far_as_their_variance_says() -> None:
    model = one_layer()
    (graft,) = model.get_base_model()[0].all_grafts()
    params = graft.params
    torch.manual_seed(0)
    variant = graft.method.variant
    with torch.no_grad():
        many = torch.stack([variant._deviation(graft.method, params) for _ in range(3000)])
        mixtures = []
        for _ in range(3000):
            variant._deviation(graft.method, params)
            mixtures.append(params[monteclora.MIXTURE].square().sum())
        square = torch.stack(mixtures).mean()
    rank = 3  # the mean of χ² with so many degrees of freedom
    expected = 0.7**2 * square * rank * (2 * params[monteclora.STD]).exp()
    found = many.square().mean((0, 2))
    torch.testing.assert_close(found, expected.detach(), rtol=0.1, atol=0.0)
    assert many.mean().abs() < 0.02


def test_the_file_tells_of_the_last_samples_as_in_peft() -> None:
    model = one_layer()
    model(torch.randn(4, 6))
    state = multigraft.get_peft_model_state_dict(model)
    base = "base_model.model.0.lora_monteclora_sampler"
    variance = state[f"{base}.gaussian_var_prior"]
    assert torch.equal(variance, variance.diag().diag())
    assert (variance.diag() > 0).all()
    torch.testing.assert_close(state[f"{base}.expert_weights"].sum(), torch.tensor(1.0))
    assert not any("draw" in key for key in state)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_samples", 0, "`num_samples` \\(=0\\) must be an integer of at least 1"),
        ("buffer_size", True, "`buffer_size` .*an integer of at least 1"),
        ("dirichlet_prior", 0.0, "`dirichlet_prior` .*above 0"),
        ("sample_scaler", -1.0, "`sample_scaler` .*at least 0"),
        ("kl_loss_weight", float("nan"), "`kl_loss_weight` .*at least 0"),
        ("use_entropy", 1, "`use_entropy` .*True or False"),
    ],
)
def test_values_that_are_not_allowed_are_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MontecloraConfig(**{option: value})
    with pytest.raises(ConfigError, match=message):
        LoraConfig(monteclora_config={option: value})


def test_other_kinds_of_layers_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    with pytest.raises(TargetError, match="for linear layers, not for embedding; leave this layer"):
        multigraft.get_peft_model(model, LoraConfig(target_modules=["0"], monteclora_config={}))


def test_the_users_config_stays_and_saves_as_peft_reads_it() -> None:
    config = LoraConfig(monteclora_config=MontecloraConfig(num_samples=5))
    assert copy.deepcopy(config).to_dict()["monteclora_config"]["num_samples"] == 5
    with quiet():
        read = peft.LoraConfig(monteclora_config=config.to_dict()["monteclora_config"])
    assert read.monteclora_config.num_samples == 5
