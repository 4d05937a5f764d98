"""A pair at work: its model with adapters, what it is given, and how near it must come."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import multigraft
from multigraft import PeftModel
from multigraft.config import CONFIGS
from multigraft.graft import Graft
from multigraft.methods import METHODS
from tests.contracts.pairs import STORAGES, TARGET, Pair, Subject
from tests.laws import bits_of

REFUSALS = (multigraft.TargetError, multigraft.UnsupportedError, multigraft.ConfigError)


def attach(pair: Pair, *adapters: str, subject: Subject | None = None) -> PeftModel:
    """The pair's model with these adapters, each with values of its own, the first one active."""
    subject = subject if subject is not None else exact(pair, pair.subject())
    model = None
    for index, name in enumerate(adapters or ("a",)):
        config = CONFIGS[pair.peft_type](**pair.kwargs())
        torch.manual_seed(10 + index)
        if model is None:
            model = multigraft.get_peft_model(
                subject, config, name, autocast_adapter_dtype=not is_plain(pair)
            )
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=not is_plain(pair))
        fill(model, name, seed=20 + index)
    assert model is not None
    return model.eval()


def fill(model: PeftModel, adapter: str, seed: int) -> None:
    """Move every trainable value of an adapter away from where it began."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, graft in model.roster.grafts(adapter):
            for tensor in graft.parameters():
                tensor += 0.1 * torch.randn(tensor.shape, generator=source).to(tensor.dtype)


def is_plain(pair: Pair) -> bool:
    """Whether the storage holds any dtype as it is, so that laws can be tried in float64."""
    return pair.storage == "float32"


def exact(pair: Pair, subject: Subject) -> Subject:
    """In float64 where the storage allows it."""
    return subject.double() if is_plain(pair) else subject


def batch(pair: Pair) -> Tensor:
    """The pair's input, in float64 where the storage allows it."""
    x = pair.input()
    return x.double() if is_plain(pair) and x.is_floating_point() else x


def tolerance(pair: Pair) -> float:
    """Relative difference that rounding explains."""
    return 1e-9 if is_plain(pair) else 16 * pair.rounding


def acting(model: PeftModel, pair: Pair, adapter: str) -> list[Graft]:
    """As `grafts`; there may be none."""
    return [
        graft
        for layer, graft in model.roster.grafts(adapter)
        if graft.method.name == pair.method and layer.path.split(".")[0] == TARGET
    ]


def grafts(model: PeftModel, pair: Pair, adapter: str = "a") -> list[Graft]:
    """The grafts of the method under test on the layer under test."""
    found = acting(model, pair, adapter)
    assert found, f"{pair}: the config attached no {pair.method}"
    return found


def assert_near(found: Tensor, expected: Tensor, rel: float) -> None:
    """Equal up to ``rel`` of the expected tensor's norm."""
    assert found.shape == expected.shape
    off = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert off <= rel, f"relative difference {off:.3g}, allowed {rel:.3g}"


def base_bits(model: PeftModel) -> dict[str, bytes]:
    """Bits of every tensor of the layer under test."""
    layer = model.get_base_model().get_submodule(TARGET).base_layer
    return {n: bits_of(t) for n, t in layer.state_dict().items() if isinstance(t, Tensor)}


class Tried(NamedTuple):
    """What came of attaching a pair's adapter.

    Args:
        standing: ``"supported"``, ``"refused"``, or ``"passed by"``: not acting on the layer.
        mergeable: whether the method's instance there has a merged form.
    """

    standing: str
    mergeable: bool = False


@functools.lru_cache(None)
def tried(pair: Pair) -> Tried:
    """Attached once, for all that is asked."""
    try:
        model = multigraft.get_peft_model(pair.subject(), CONFIGS[pair.peft_type](**pair.kwargs()))
    except REFUSALS:
        return Tried("refused")
    found = acting(model, pair, "default")
    return Tried("supported", found[0].method.mergeable) if found else Tried("passed by")


def mergeable(pair: Pair) -> bool:
    """Whether the method has a merged form at this site, and the storage takes it."""
    return tried(pair).mergeable and STORAGES[pair.storage].merges


def replaces(pair: Pair) -> bool:
    """Whether merging takes over a module's own tensors, whatever its weight is stored as."""
    return METHODS[pair.method].kind == "replace"


def begins_still(pair: Pair) -> bool:
    """Whether a new adapter changes nothing, as the method's instance at this site claims."""
    if not METHODS[pair.method].identity_at_init:
        return False
    return grafts(attach(pair), pair)[0].method.identity_at_init


def has_exact_gradients(pair: Pair) -> bool:
    """What the method's instance at this site claims."""
    return grafts(attach(pair), pair)[0].method.has_exact_gradients
