"""The outline of a structure, and the tree that is drawn of it."""

from __future__ import annotations

import torch
from torch import nn

from multigraft import LoraConfig, get_peft_model
from multigraft.inspection import Node, inspect, outline, render
from tests.subject import Net


def net():
    torch.manual_seed(0)
    model = get_peft_model(
        Net(), LoraConfig(r=2, lora_alpha=4, target_modules=["up"]), adapter_name="one"
    )
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=4, target_modules=["up", "head"]))
    return model


def test_the_whole_tree_as_text():
    total = sum(p.numel() for p in Net().parameters())
    assert render(outline(inspect(net()))) == "\n".join(
        [
            f"Net  one frozen base of {total:,} parameters, 2 adapters at 3 sites",
            "├── layers.{0..1}.up  Linear 24×16, 2 of them",
            "│   ├── one  LORA, rank 2, scaling 2, active, trainable, 160 parameters",
            "│   └── two  LORA, rank 4, scaling 1, inactive, frozen, 320 parameters",
            "└── head  Linear 5×16",
            "    └── two  LORA, rank 4, scaling 1, inactive, frozen, 84 parameters",
        ]
    )


def test_adapters_of_a_site_are_siblings_and_have_no_children():
    root = outline(inspect(net()))
    for group in root.children:
        assert group.children
        assert all(not adapter.children for adapter in group.children)


def test_a_merged_adapter_is_said_to_be():
    model = net()
    model.merge_adapter(["one"])
    (one, two) = outline(inspect(model)).children[0].children
    assert "merged" in one.note
    assert "merged" not in two.note


def test_a_method_without_a_rank_shows_none():
    model = get_peft_model(
        Net(), LoraConfig(target_modules=["up"], modules_to_save=["head"]), adapter_name="a"
    )
    head = next(group for group in outline(inspect(model)).children if group.label == "head")
    assert "rank" not in head.children[0].note


def test_one_of_a_kind_is_not_called_many():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert outline(inspect(model)).note == ("one frozen base of 20 parameters, 1 adapter at 1 site")


def test_a_model_without_adapters_is_one_line():
    assert render(outline(inspect(nn.Linear(4, 4)))) == (
        "Linear  one base of 20 parameters (20 trainable), 0 adapters at 0 sites"
    )


def test_branches_are_drawn_for_any_depth():
    tree = Node("a", "", (Node("b", "x", (Node("c"), Node("d"))), Node("e", "", (Node("f"),))))
    assert render(tree) == "a\n├── b  x\n│   ├── c\n│   └── d\n└── e\n    └── f"
