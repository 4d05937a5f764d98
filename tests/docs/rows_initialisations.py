"""Rows about where LoRA's A and B begin."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multigraft import StateError
from tests.docs.comparison import Raises, X, config, graft, near, net, row

PISSA = {"init_lora_weights": "pissa", "r": 2}


def moved(model: Any) -> Any:
    """The model with trained values."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@row("PiSSA, OLoRA and their kin, disabled or unloaded", peft=(False, False), ours=(True, True))
def _(library, folder):
    model = graft(library, **PISSA)
    with model.disable_adapter():
        disabled = torch.equal(model(X), net()(X))
    return disabled, torch.equal(model.unload()(X), net()(X))


@row("a second adapter that begins at the weight", peft=False, ours=True)
def _(library, folder):
    model = moved(graft(library, **PISSA))
    before = model(X)
    model.add_adapter("b", config(library, **PISSA))
    return near(model(X), before)


@row("`pissa_niter_4`, saved and loaded", peft=False, ours=True)
def _(library, folder):
    model = moved(graft(library, init_lora_weights="pissa_niter_4", r=2))
    model.save_pretrained(folder)
    base = net()
    torch.manual_seed(9)
    again = library.PeftModel.from_pretrained(base, folder / "a", adapter_name="a").eval()
    return near(again(X), model(X))


@row("the scaling of PiSSA set to zero", peft=False, ours=True)
def _(library, folder):
    model = moved(graft(library, **PISSA))
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("a", 0.0)
    return near(model(X), net()(X))


@row("OLoRA on `Conv1D`", peft=Raises(RuntimeError), ours=True)
def _(library, folder):
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(4, 8))
    expected = base(X)
    return near(graft(library, ["0"], base=base, init_lora_weights="olora")(X), expected)


@row(
    "`path_initial_model_for_weight_conversion` and rsLoRA with patterns",
    peft=Raises(ValueError, "not supported"),
    ours=True,
)
def _(library, folder):
    model = graft(library, **PISSA, use_rslora=True, alpha_pattern={"head": 3}, name="default")
    initial = str(folder / "initial")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = "pissa"
    moved(model).save_pretrained(folder, path_initial_model_for_weight_conversion=initial)
    return near(library.PeftModel.from_pretrained(net(), folder)(X), model(X))


@row(
    '`init_lora_weights="lora_ga"` without gradients',
    peft=True,
    ours=Raises(StateError, "preprocess_loraga"),
)
def _(library, folder):
    options = importlib.import_module(
        "peft.tuners.lora.config" if library.__name__ == "peft" else "multigraft"
    )
    given = {"init_lora_weights": "lora_ga", "lora_ga_config": options.LoraGAConfig()}
    return near(graft(library, **given)(X), net()(X))


class Shared(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def direction(library: Any, data: Tensor, whiten: bool) -> Tensor:
    """EVA's first direction of the input of `q`."""
    torch.manual_seed(0)
    given = {"init_lora_weights": "eva", "r": 2, "target_modules": ["q", "k", "v"]}
    eva = library.EvaConfig(rho=1.0, whiten=whiten)
    model = library.get_peft_model(Shared(), library.LoraConfig(**given, eva_config=eva))
    more = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    run = {"forward_fn": lambda model, x: model(x), "show_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = library.get_eva_state_dict(model, [data, data], **run, **more)
    return found["base_model.model.q"][0]


@row("EVA with `whiten` where three layers share an input", peft=3, ours=1)
def _(library, folder):
    data = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    plain, white = (direction(library, data, whiten) for whiten in (False, True))
    both = torch.cat([data, data])
    root = torch.linalg.svdvals(both - both.mean(0))[0].sqrt()
    return round(float((plain.norm() / white.norm()).log() / root.log()))
