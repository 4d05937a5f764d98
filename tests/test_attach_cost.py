"""What one more adapter costs in Python objects, which decide how often all of them are walked."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, PeftModel, get_peft_model

SITES = 40


def blocks() -> nn.Module:
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(SITES))


def config() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear")


def objects_of_one_more(model: PeftModel, name: str) -> float:
    """Objects a site that the garbage collector follows from now on."""
    gc.collect()
    before = len(gc.get_objects())
    model.add_adapter(name, config())
    gc.collect()
    return (len(gc.get_objects()) - before) / SITES


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(blocks(), config(), "first")
    model.add_adapter("second", config())  # tables that are made once
    return model


def test_an_adapter_is_a_few_objects_at_each_site(model: PeftModel) -> None:
    # 2 parameters, 2 leaves with their tables, graft, method, site, and what ties them together;
    # PEFT 0.21.2 needs 46.
    assert objects_of_one_more(model, "third") < 16


def test_the_twentieth_adapter_is_as_many_objects_as_the_third(model: PeftModel) -> None:
    third = objects_of_one_more(model, "third")
    for index in range(16):
        model.add_adapter(f"more {index}", config())
    assert objects_of_one_more(model, "last") == pytest.approx(third, abs=0.5)


def test_sites_of_one_shape_share_what_their_method_declares(model: PeftModel) -> None:
    grafts = [graft for _, graft in model.roster.grafts("second")]
    assert len(grafts) == SITES
    assert len({id(graft.own_specs) for graft in grafts}) == 1


def test_a_method_that_declares_something_else_has_a_table_of_its_own(model: PeftModel) -> None:
    model.add_adapter("wider", LoraConfig(r=3, target_modules="all-linear"))
    (narrow,), (wider,) = (
        {id(graft.own_specs) for _, graft in model.roster.grafts(name)}
        for name in ("second", "wider")
    )
    assert narrow != wider


def test_values_are_drawn_once_for_each_first_factor_and_for_nothing_else(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Size] = []
    uniform = torch.Tensor.uniform_

    def watched(self: torch.Tensor, *args: float) -> torch.Tensor:
        drawn.append(self.shape)
        return uniform(self, *args)

    monkeypatch.setattr(torch.Tensor, "uniform_", watched)
    model.add_adapter("third", config())
    assert drawn == [torch.Size([2, 4])] * SITES
