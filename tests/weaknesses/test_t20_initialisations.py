"""T20: initialisations that begin at the base's weight give the base back, and reload exactly.

PEFT 0.21.2: PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ write what is left into the base's weight for
good; ``pissa_niter_4`` reloads to another output; and reloading PiSSA with
``low_cpu_mem_usage=True`` raises.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, PeftModel
from tests.initialisations.nets import batch, net, off, options, ours, theirs, train
from tests.laws import fingerprint
from tests.oracle import quiet


def corda(base: nn.Module) -> Any:
    config = LoraConfig(**options("corda"))
    multigraft.preprocess_corda(base, config, lambda: base(batch(40)[None]))
    return multigraft.get_peft_model(base, config).eval()


def lora_ga(base: nn.Module) -> Any:
    config = LoraConfig(**options("lora_ga"))
    multigraft.preprocess_loraga(base, config, lambda: base(batch(40)).square().sum().backward())
    return multigraft.get_peft_model(base, config).eval()


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "pissa": lambda base: ours("pissa", base),
    "pissa_niter_4": lambda base: ours("pissa_niter_4", base),
    "olora": lambda base: ours("olora", base),
    "corda": corda,
    "lora_ga": lora_ga,
    "loftq": lambda base: ours("loftq", base, loftq_config={"loftq_iter": 3}),
}

every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@every
def test_disabling_gives_the_bases_output(make: Callable[[nn.Module], Any]) -> None:
    expected = net()(batch())
    model = train(make(net()))
    assert off(model(batch()), expected) > 0.01
    with model.disable_adapter():
        assert torch.equal(model(batch()), expected)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "loftq"])
def test_what_is_taken_out_and_what_is_added_cancel_to_the_last_bit(name: str) -> None:
    assert torch.equal(MAKERS[name](net())(batch()), net()(batch()))


@every
def test_deleting_and_unloading_give_the_very_base_back(
    make: Callable[[nn.Module], Any],
) -> None:
    base = net()
    before = fingerprint(base)
    model = train(make(base))
    model.delete_adapter("default")
    assert fingerprint(base) == before
    assert train(make(base)).unload() is base
    assert fingerprint(base) == before


@every
def test_merging_and_unmerging_give_the_bits_back(make: Callable[[nn.Module], Any]) -> None:
    base = net()
    weight = base.first.weight.clone()
    model = train(make(base))
    expected = model(batch())
    model.merge_adapter()
    assert off(model(batch()), expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(model.unload().first.weight, weight)


@every
def test_reloading_is_exact(make: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = train(make(net()))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(again(batch()), model(batch()))


@every
def test_an_adapter_beside_it_sees_the_whole_base(make: Callable[[nn.Module], Any]) -> None:
    model = train(make(net()))
    config = LoraConfig(**options(True))
    model.add_adapter("plain", config)
    model.set_adapter("plain")
    assert torch.equal(model(batch()), net()(batch()))


def test_peft_does_not_give_the_base_back() -> None:
    base = net()
    model = theirs("pissa", base)
    with quiet(), model.disable_adapter():
        assert off(model(batch()), net()(batch())) > 0.05
    assert off(model.unload()(batch()), net()(batch())) > 0.05


def test_peft_reloads_a_random_decomposition_to_another_output(tmp_path: Path) -> None:
    model = theirs("pissa_niter_4")
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    base = net()
    torch.manual_seed(9)
    with quiet():
        again = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert off(again(batch()), model(batch())) > 1e-3
