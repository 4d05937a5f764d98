"""Weights under `torch.nn.utils.parametrize`, and under the hooks that it replaced."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from multigraft import LoraConfig, PeftModel, TargetError, UnsupportedError, get_peft_model
from multigraft.storage import storage_of
from tests.laws import fingerprint
from tests.storage.cases import CASES

KINDS = ["weight-norm", "weight-norm-hook"]


class Symmetric(nn.Module):
    """Cannot take any matrix, and says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T

    def right_inverse(self, weight: Tensor) -> Tensor:
        if not torch.equal(weight, weight.T):
            raise ValueError("not symmetric")
        return weight.triu()


class Shifted(nn.Module):
    """Takes any matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight - 1


class OneWay(nn.Module):
    """Has no inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def adapted(layer: nn.Module, target: str = "0") -> PeftModel:
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(layer), config)


def rows() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_is_written_as_norm_and_direction(dim, old):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm = torch.nn.utils.weight_norm if old else parametrizations.weight_norm
        layer, wanted = norm(nn.Linear(16, 8), dim=dim), torch.randn(8, 16)
    storage_of(layer).write(layer, wanted)
    layer(torch.randn(2, 16))
    torch.testing.assert_close(layer.weight, wanted)
    named = dict(layer.named_parameters())
    g = named["weight_g" if old else "parametrizations.weight.original0"]
    axes = [a for a in (0, 1) if a != dim]
    torch.testing.assert_close(g.flatten(), wanted.norm(dim=axes).flatten())


@pytest.mark.parametrize("name", KINDS)
def test_a_normalised_convolution_is_merged_and_unmerged(name):
    layer, x = CASES[name].build(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 6, 6)
    model = adapted(layer)
    with torch.no_grad():
        apart, before = model(x), fingerprint(model)
        model.merge_adapter()
        torch.testing.assert_close(model(x), apart)
        model.unmerge_adapter()
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", KINDS)
def test_what_is_trained_is_the_adapter_and_not_the_norm(name):
    model = adapted(CASES[name].make(64, 64))
    model(rows()).square().mean().backward()
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in path), path


def test_reading_spectral_norm_in_training_changes_no_buffer():
    for name in ("spectral-norm", "spectral-norm-hook"):
        layer = CASES[name].make(64, 64).train()
        before = fingerprint(layer)
        read = storage_of(layer).read(layer)
        storage_of(layer).refusal(layer)
        assert fingerprint(layer) == before, name
        layer.eval()(rows())
        assert torch.equal(read, layer.weight), name


@pytest.mark.parametrize("seed", range(20))
def test_spectral_norm_is_refused_whatever_the_weights_are(seed):
    layer = CASES["spectral-norm"].make(64, 128, seed=seed)
    assert "_SpectralNorm" in storage_of(layer).refusal(layer)


@pytest.mark.parametrize(
    ("function", "reason"),
    [(Symmetric(), "Symmetric: not symmetric"), (OneWay(), "OneWay"), (Shifted(), None)],
)
def test_a_parametrisation_of_ones_own_is_written_where_its_inverse_is_one(function, reason):
    layer = nn.Linear(8, 8)
    layer.weight.data.copy_(layer.weight.data + layer.weight.data.T)
    parametrize.register_parametrization(layer, "weight", copy.deepcopy(function), unsafe=True)
    refusal = storage_of(layer).refusal(layer)
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in refusal


def test_two_parametrisations_in_a_row_are_inverted_from_the_outside():
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    parametrize.register_parametrization(layer, "weight", Shifted())
    wanted = torch.randn(8, 8)
    assert storage_of(layer).refusal(layer) is None
    storage_of(layer).write(layer, wanted)
    torch.testing.assert_close(layer.weight, wanted)


def test_a_parametrised_bias_is_merged_into_through_its_parametrisation():
    layer = parametrize.register_parametrization(nn.Linear(64, 64), "bias", Shifted())
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True)
    model = get_peft_model(nn.Sequential(layer), config)
    with torch.no_grad():
        model.get_base_model()[0].lora_B["default"].bias.normal_()
        apart, before = model(rows()), fingerprint(model)
        model.merge_adapter()
        torch.testing.assert_close(model(rows()), apart)
        model.unmerge_adapter()
    assert fingerprint(model) == before


def test_targets_never_mean_the_insides_of_a_parametrisation():
    """Here `0` would also be the name of the first function of layer 0's own list."""
    net = nn.Sequential(CASES["weight-norm"].make(64, 64), nn.Linear(64, 64))
    model = get_peft_model(net, LoraConfig(target_modules=["0"]))
    assert [layer.path for layer in model.base_model.layers()] == ["0"]
    with pytest.raises(TargetError):
        get_peft_model(model.unload(), LoraConfig(target_modules=r".*\.weight\.0"))


@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrised_module_is_copied_whole_and_merged(bias):
    net = nn.Sequential(nn.Linear(64, 64), CASES["weight-norm"].make(64, 64, bias=bias)).eval()
    model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        apart, before = model(rows()), fingerprint(model)
        model.merge_adapter()
        torch.testing.assert_close(model(rows()), apart)
        model.unmerge_adapter()
    assert fingerprint(model) == before


def test_a_copy_and_a_change_of_the_weight_under_it_are_not_merged_together():
    layer = CASES["weight-norm"].make(64, 64)
    net = nn.Sequential(nn.Linear(64, 64), layer)
    model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    model.add_adapter("b", LoraConfig(target_modules=["1"], init_lora_weights=False))
    model.set_adapter(["default", "b"])
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match="computed from tensors that a trained copy of this"):
        model.merge_adapter()
    assert fingerprint(model) == before
