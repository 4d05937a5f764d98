"""DoRA against PEFT: magnitude and direction apart, at every kind of layer."""

from __future__ import annotations

from typing import ClassVar

import peft
import pytest
import torch

import multigraft
from tests.methods.against_peft import Case, DropsLikePeft, filled, near
from tests.oracle import our_config, peft_config, peft_state, quiet

DORA = {"r": 4, "lora_alpha": 6, "use_dora": True}


class TestDora(DropsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Case("linear", DORA),
        "no bias": Case("linear wide", DORA),
        "Conv1D": Case("conv1d_transposed", DORA),
        "embedding": Case("embedding", DORA),
        "conv1d": Case("conv1d", DORA),
        "conv2d": Case("conv2d", DORA),
        "conv2d 1x1": Case("conv2d 1x1", DORA),
        "conv3d": Case("conv3d", DORA),
        "rsLoRA": Case("linear", DORA | {"use_rslora": True}),
        "dropout in evaluation": Case("linear", DORA | {"lora_dropout": 0.5}),
    }
    dropping: ClassVar = {
        layer: Case(layer, DORA | {"lora_dropout": 0.5})
        for layer in ("linear", "conv1d_transposed", "conv2d")
    }


def test_the_magnitude_starts_as_the_weights_norm() -> None:
    for layer in ("linear", "conv1d_transposed", "embedding", "conv2d"):
        case = Case(layer)
        options = {"target_modules": ["layer"], **DORA}
        ours = multigraft.get_peft_model(case.model(), our_config(options)).double()
        with quiet():
            theirs = peft.get_peft_model(case.model(), peft_config(options)).double()
        key = "base_model.model.layer.lora_magnitude_vector"
        own = multigraft.get_peft_model_state_dict(ours)[key]
        expected = peft_state(theirs)[key]
        assert own.shape == expected.shape
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", ["linear", "conv1d_transposed", "embedding", "conv2d"])
def test_two_adapters_at_once_add_up(layer: str) -> None:
    """Each changes the base's own output.

    PEFT's second one also scales the first one's change, but not in training with dropout.
    """
    case = Case(layer)
    base = case.model()
    layer_of = base.layer
    model = multigraft.get_peft_model(base, our_config({"target_modules": ["layer"], **DORA}))
    model.add_adapter("other", our_config({"target_modules": ["layer"], **DORA, "r": 2}))
    model.double().eval()
    for name, noise in (("default", 0.3), ("other", 0.5)):
        state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
        multigraft.set_peft_model_state_dict(model, filled(state, noise), name)
    x = case.model().batch()
    adapted = base.layer
    plain = layer_of(x)
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(adapted(x) - plain)
        assert changes[-1].abs().max() > 0.1
    model.set_adapter(["default", "other"])
    near(adapted(x), plain + changes[0] + changes[1])
