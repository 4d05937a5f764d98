"""The table of a structure: plain text, rich's drawing, and which of the two is printed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from rich.console import Console
from torch import nn

from multigraft import LoraConfig, get_peft_model, inspect
from multigraft.inspection.table import HEAD, rows
from tests.subject import Net


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = get_peft_model(
        Net(), LoraConfig(r=2, lora_alpha=4, target_modules=["up"]), adapter_name="one"
    )
    model.add_adapter("two", LoraConfig(r=4, target_modules=["up", "head"]))
    return model


def cells(model: nn.Module) -> list[list[str]]:
    return [line.split() for line in str(inspect(model)).splitlines()[3:]]


def test_each_line_has_its_columns(model):
    assert str(inspect(model)).splitlines()[2].split() == list(HEAD)
    site = ["layers.{0..1}.up", "×2", "Linear", "24×16", "float32", "cpu", "816"]
    one = ["├──", "one", "LORA", "2", "2", "yes", "–", "yes", "float32", "cpu", "160"]
    two = ["└──", "two", "LORA", "4", "2", "–", "–", "–", "float32", "cpu", "320"]
    assert cells(model)[:3] == [site, one, two]


def test_the_columns_follow_the_state(model):
    model.set_adapter("two")
    model.merge_adapter()
    one, two = cells(model)[1:3]
    assert one[5:8] == ["–", "–", "–"]
    assert two[5:8] == ["yes", "yes", "yes"]


def test_dtype_and_device_are_those_of_each_line(model):
    model.get_submodule("base_model.model.head").lora_A.bfloat16()
    head, adapter = cells(model)[3:]
    assert head[-3:-1] == ["float32", "cpu"]
    assert adapter[-3:-1] == ["bfloat16+float32", "cpu"]


def test_a_nest_is_marked_in_its_line_and_in_the_title(model):
    outer = model.get_submodule("base_model.model.head")
    outer.base_layer.add_module("inside", model.get_submodule("base_model.model.layers.0.up"))
    structure = inspect(model)
    assert str(structure).splitlines()[0].endswith(", 1 NESTED")
    (nested,) = (row for row in rows(structure) if row.is_nested)
    assert nested.cells[0] == "└── NESTED base_layer.inside"


def test_a_base_that_trains_is_counted_in_the_title(model):
    assert "(0 trainable)" in str(inspect(model))
    model.get_submodule("base_model.model.conv").bias.requires_grad_(True)
    assert "(16 trainable)" in str(inspect(model))


def test_a_model_without_adapters_is_its_title():
    assert str(inspect(nn.Linear(2, 2))) == (
        "Linear: base of 6 parameters (6 trainable), 0 adapters at 0 sites"
    )


def test_rich_draws_the_same_cells(model):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspect(model))
    drawn = [line.split() for line in capture.get().splitlines()]
    assert drawn[2:] == cells(model)


@pytest.mark.parametrize("has_rich", [True, False])
def test_show_prints_the_text_where_there_is_no_terminal(model, capsys, monkeypatch, has_rich):
    if not has_rich:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    inspect(model).show()
    assert capsys.readouterr().out == f"{inspect(model)}\n"
