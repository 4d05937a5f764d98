"""No two variants act in one adapter, and adapters of any two stand side by side."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

import multigraft
from multigraft import LoraConfig, UnsupportedError
from multigraft.variants import VARIANTS
from tests.methods.against_peft import near
from tests.variants.invoked import IDS, base

OPTIONS: dict[str, dict[str, Any]] = {
    "alora": {"alora_invocation_tokens": [5, 6]},
    "arrow": {"arrow_config": {"task_adapter_names": ["expert"]}},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2}},
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": {}},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "mica": {"init_lora_weights": "mica"},
    "monteclora": {"monteclora_config": {}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {}},
}
PAIRS = [
    (one, other)
    for one, other in combinations(sorted(OPTIONS), 2)
    if not OPTIONS[one].keys() & OPTIONS[other].keys()  # one option names one of them
]


def test_every_variant_is_tried() -> None:
    assert sorted(OPTIONS) == sorted(name for name, _ in VARIANTS.items())


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_in_one_config_are_refused_by_name(one: str, other: str) -> None:
    with pytest.raises(UnsupportedError, match=f"`{one}`, `{other}` cannot be combined; choose"):
        LoraConfig(**OPTIONS[one], **OPTIONS[other])


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_each_stands_beside_a_plain_pair(name: str) -> None:
    """Their changes add up in a layer, and a mixed batch is row by row."""
    shared: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    model = multigraft.get_peft_model(base(), LoraConfig(**shared), "expert")
    model.add_adapter("own", LoraConfig(**shared, **OPTIONS[name]))
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in ("expert", "own"):
            for parameter in model.roster.parameters(adapter):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    seen = {}
    layer.register_forward_hook(lambda _, __, y: seen.update(y=y))
    alone, rows = {}, {}
    with torch.no_grad():
        for adapters in ([], ["expert"], ["own"], ["expert", "own"]):
            model.base_model.set_adapter(adapters)
            rows["".join(adapters)] = model(IDS).logits
            alone["".join(adapters)] = seen["y"]
        names = ["own", "expert", "__base__", "own", "own"]
        mixed = model(IDS, adapter_names=names).logits
    near(alone["expertown"], alone["expert"] + alone["own"] - alone[""])
    assert not torch.allclose(alone["own"], alone[""])
    for row, adapter in enumerate(names):
        near(mixed[row], rows[adapter if adapter != "__base__" else ""][row], adapter)
