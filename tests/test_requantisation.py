"""What requantising a merged weight loses: measured, said once, and to be asked for."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, MultigraftWarning, PeftModel, get_peft_model
from multigraft.requantisation import Loss
from multigraft.storage import storage_of
from tests.laws import fingerprint
from tests.storage.cases import CASES, EXACT, LOSSY


def adapted(name: str, layers: int = 2, size: float = 1.0) -> PeftModel:
    net = nn.Sequential(*(CASES[name].make(64, 64, seed=n) for n in range(layers))).eval()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r"\d+", init_lora_weights=False)
    model = get_peft_model(net, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(size)
    return model


def warned(model: PeftModel) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    return [str(w.message) for w in caught if issubclass(w.category, MultigraftWarning)]


@pytest.mark.parametrize("name", LOSSY)
def test_the_report_is_the_distance_between_what_was_wanted_and_what_is_stored(name):
    model = adapted(name, layers=1)
    layer = model.get_base_model()[0]
    storage, base = storage_of(layer.base_layer), layer.base_layer
    own = storage.read(base).double().clone()
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    delta = layer.scaling["default"] * B @ A
    warned(model)
    off = float((storage.read(base).double() - own - delta).norm())
    (loss,) = model.merge_report
    assert loss.where == "0.weight"
    assert loss.storage == storage.name
    assert loss.error == pytest.approx(off / float((own + delta).norm()), rel=1e-3)
    assert loss.share == pytest.approx(off / float(delta.norm()), rel=1e-3)


@pytest.mark.parametrize("name", LOSSY)
def test_one_warning_a_merge_names_the_worst_sites_and_their_errors(name):
    model = adapted(name, layers=5)
    (message,) = warned(model)
    worst = model.merge_report[:3]
    assert ", ".join(f"{loss.where} {loss.error:.1%}" for loss in worst) in message
    assert "and 2 more tensors" in message
    assert worst == sorted(worst, key=lambda loss: -loss.error)
    assert "unmerging restores the base exactly" in message


@pytest.mark.parametrize("name", EXACT)
def test_exact_storages_report_nothing(name):
    model = adapted(name)
    assert warned(model) == []
    assert model.merge_report == []


def test_the_report_follows_what_is_merged_now():
    model = adapted("bnb-nf4")
    model.add_adapter("b", LoraConfig(target_modules=["1"], init_lora_weights=False))
    model.set_adapter(["default", "b"])
    warned(model)
    both = {loss.where: loss for loss in model.merge_report}
    model.unmerge_adapter(["default"])
    (left,) = model.merge_report
    assert left.where == "1.weight"
    assert left != both["1.weight"]
    model.unmerge_adapter(["b"])
    assert model.merge_report == []


def test_the_report_outlives_merge_and_unload():
    model = adapted("bnb-nf4")
    with pytest.warns(MultigraftWarning, match="merged into quantised weights"):
        model.merge_and_unload()
    assert len(model.merge_report) == 2


def test_a_change_below_the_rounding_is_said_to_be_lost():
    model = adapted("bnb-nf4", size=0.02)
    (message,) = warned(model)
    share = max(loss.share for loss in model.merge_report)
    assert share > 1
    assert f"up to {share:.2g} times what the adapters add" in message


@pytest.mark.parametrize("name", LOSSY)
def test_values_that_a_format_cannot_hold_leave_the_model_as_it_was(name):
    model = adapted(name)
    with torch.no_grad():
        model.get_base_model()[1].lora_B["default"].weight[0, 0] = 3e38
        model.get_base_model()[1].lora_A["default"].weight.fill_(1e30)
    before, known = fingerprint(model), model.merge_report
    with pytest.raises(ValueError, match=r"^1: .*nothing was merged|would hold"):
        model.merge_adapter()
    assert fingerprint(model) == before
    assert model.merge_report == known == []


def test_a_zero_weight_that_is_kept_has_no_error():
    zero = torch.zeros(4, 4)
    loss = Loss.of("x", "bnb4", zero, zero, zero)
    assert (loss.error, loss.share, loss.is_finite) == (0.0, 0.0, True)


def test_a_loss_without_a_number_is_not_finite():
    one = torch.ones(4, 4)
    loss = Loss.of("x", "bnb4", one, one, one * math.nan)
    assert not loss.is_finite
