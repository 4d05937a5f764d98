"""T8: what is merged into a parametrised weight is there afterwards, or the merge is refused.

PEFT 0.21.2 adds to ``weight.data``, which is a temporary: the merge changes nothing, silently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from multigraft import LoraConfig, PeftModel, UnsupportedError, get_peft_model
from tests.laws import fingerprint
from tests.oracle import quiet

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(1))


class Doubled(nn.Module):
    """A parametrisation of one's own, with an inverse."""

    def forward(self, W: Tensor) -> Tensor:
        return 2 * W

    def right_inverse(self, W: Tensor) -> Tensor:
        return W / 2


class Symmetric(nn.Module):
    """One without: half of a weight is lost in it."""

    def forward(self, W: Tensor) -> Tensor:
        return W.triu() + W.triu(1).mT


def of(make: Callable[[nn.Module], Any], layer: Callable[[], nn.Module]) -> nn.Module:
    """A layer whose weight is computed, before another one."""
    torch.manual_seed(0)
    inner = layer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of the old hooks
        make(inner)
    return nn.ModuleDict({"first": inner, "last": nn.Linear(6, 6)}).eval()


def run(model: Any) -> Tensor:
    base = model.get_base_model() if isinstance(model, (PeftModel, peft.PeftModel)) else model
    first = base["first"]
    x = IMAGE if hasattr(first, "kernel_size") else X
    return first(x)


def linear() -> nn.Module:
    return nn.Linear(6, 6)


def conv() -> nn.Module:
    return nn.Conv1d(6, 4, 3)


WRITTEN: dict[str, tuple[Callable[[nn.Module], Any], Callable[[], nn.Module]]] = {
    "weight_norm": (parametrizations.weight_norm, linear),
    "weight_norm of columns": (lambda m: parametrizations.weight_norm(m, dim=1), linear),
    "weight_norm of a convolution": (parametrizations.weight_norm, conv),
    "the old weight_norm": (nn.utils.weight_norm, linear),
    "one's own": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()), linear),
}
REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "the old spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "without an inverse": (
        lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
        "remove_parametrizations",
    ),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "make it plain first"),
}


def adapted(base: nn.Module) -> PeftModel:
    config = LoraConfig(target_modules=["first"], r=2, init_lora_weights=False)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("case", WRITTEN)
def test_t8_a_merge_is_there_afterwards(case: str, safe: bool):
    base = of(*WRITTEN[case])
    before, plain = fingerprint(base), run(base)
    model = adapted(base)
    y = run(model)
    assert (y - plain).abs().max() > 0.1
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(run(model), y)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model), y)
    model.unload()
    assert fingerprint(base) == before


@pytest.mark.parametrize("case", WRITTEN)
def test_t8_what_is_unloaded_with_a_merge_in_it_stays_parametrised(case: str):
    base = of(*WRITTEN[case])
    kind, names = type(base["first"]), sorted(base.state_dict())
    model = adapted(base)
    y = run(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), y)
    assert type(merged["first"]) is kind and sorted(merged.state_dict()) == names


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_t8_a_weight_that_cannot_take_it_is_refused_with_the_remedy(case: str, safe: bool):
    make, remedy = REFUSED[case]
    model = adapted(of(make, linear))
    y, before = run(model), fingerprint(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match=remedy):
            merge(safe_merge=safe)
        assert fingerprint(model) == before and torch.equal(run(model), y)


def test_t8_other_layers_are_not_merged_when_one_is_refused():
    base = of(parametrizations.spectral_norm, linear)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    last = base["last"].base_layer.weight.detach().clone()
    with pytest.raises(UnsupportedError, match="first: cannot merge"):
        model.merge_adapter()
    assert torch.equal(base["last"].base_layer.weight, last) and not base["last"].merged


def test_t8_the_adapter_trains_beside_it():
    model = adapted(of(parametrizations.spectral_norm, linear)).train()
    run(model).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 2 and all(g is not None and g.abs().max() > 0 for g in grads)


def test_t8_is_still_so_in_peft():
    config = peft.LoraConfig(target_modules=["first"], init_lora_weights=False)
    with quiet():
        theirs = peft.get_peft_model(of(parametrizations.weight_norm, linear), config).eval()
        y = run(theirs)
        theirs.merge_adapter()
    plain = run(of(parametrizations.weight_norm, linear))
    torch.testing.assert_close(run(theirs), plain)
    assert (y - plain).abs().max() > 0.1
