"""Every initialisation with every variant: it acts, or is refused with the base untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, MultigraftError
from multigraft.initialisations import INITIALISATIONS
from tests.initialisations.nets import batch, net, options
from tests.laws import fingerprint

BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "bdlora": {"use_bdlora": BLOCKS},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {"num_groups": 4}},
    "monteclora": {"monteclora_config": {}},
    "kasa": {"kasa_config": {}},
    "alora": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
}
TAKES_OUT = [name for name, cls in INITIALISATIONS.items() if cls.takes_out]
PLAIN = ("none", "rslora", "bias")


def shown(base: nn.Module, config: LoraConfig) -> None:
    """The data that some need."""
    if config.init_lora_weights == "corda":
        multigraft.preprocess_corda(base, config, lambda: base(batch(40)))
    if config.init_lora_weights == "lora_ga":
        step = lambda: base(batch(40)).square().sum().backward()  # noqa: E731
        multigraft.preprocess_loraga(base, config, step)


def made(init: str, variant: str) -> tuple[nn.Module, Any]:
    """A base and what is at work on it, or the error that refused it."""
    value: Any = {"true": True, "false": False}.get(init, init)
    base = net()
    try:
        config = LoraConfig(**options(value, **VARIANTS[variant]))
        shown(base, config)
        return base, multigraft.get_peft_model(base, config).eval()
    except MultigraftError as error:
        return base, error


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", INITIALISATIONS)
def test_the_base_comes_back_or_was_never_touched(init: str, variant: str) -> None:
    expected = fingerprint(net())
    base, found = made(init, variant)
    if not isinstance(found, MultigraftError):
        found.unload()
    after = fingerprint(base)
    assert after.bits == expected.bits
    assert [entry[0] for entry in after.modules] == [entry[0] for entry in expected.modules]


@pytest.mark.parametrize("variant", ["bdlora", "qalora", "monteclora", "kasa"])
@pytest.mark.parametrize("init", TAKES_OUT)
def test_what_takes_a_part_out_is_refused_where_the_variant_would_not_see_it(
    init: str, variant: str
) -> None:
    _, found = made(init, variant)
    assert f"takes a part out of the base, which {variant} does not know of" in str(found)


@pytest.mark.parametrize("variant", [*PLAIN, "dora", "velora"])
@pytest.mark.parametrize("init", TAKES_OUT)
def test_what_takes_a_part_out_begins_at_the_bases_output(init: str, variant: str) -> None:
    _, found = made(init, variant)
    torch.testing.assert_close(found(batch()), net()(batch()), atol=1e-6, rtol=1e-6)
