"""A model with two adapters, and the check that a refusal changed nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from multigraft import LoraConfig, MultigraftError, MultigraftWarning, PeftModel, get_peft_model
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
IDS = nets.ids(2)
Operation = Callable[[PeftModel], object]


def model_of(merged: str = "", config: LoraConfig = CONFIG) -> PeftModel:
    """Adapters "a" (active) and "b", trained; those in ``merged`` are merged."""
    model = get_peft_model(nets.net(), config, adapter_name="a")
    model.add_adapter("b", config)
    nets.train_by_hand(model, "a", "b")
    if merged:
        model.merge_adapter(list(merged))
    return model


def refused(error: type[MultigraftError], model: PeftModel, operation: Operation) -> str:
    """The message of a refusal that changed nothing and warned of nothing."""
    facts, output = nets.known(model), model(IDS).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MultigraftWarning)
        with pytest.raises(error) as caught:
            operation(model)
    nets.assert_as_before(model, facts)
    assert torch.equal(model(IDS), output)
    return str(caught.value)
