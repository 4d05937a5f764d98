"""Rows about scaling, converting and optimising adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from multigraft import UnsupportedError
from tests.docs.comparison import Raises, X, config, graft, graft_two, layers, near, row


def module(library: Any, name: str) -> Any:
    """The library's helpers, optimisers or the like."""
    return __import__(f"{library.__name__}.{name}", fromlist=[name])


@row("`add_weighted_adapter` of IA3s that act on different layers", peft=0.5, ours=1.0)
def _(library, folder):
    model = None
    for name, target in (("a", ["head"]), ("b", ["overhead"])):
        made = library.IA3Config(target_modules=target, feedforward_modules=[])
        if model is None:
            model = library.get_peft_model(
                nn.ModuleDict({"head": nn.Linear(8, 4), "overhead": nn.Linear(4, 4)}), made, name
            )
        else:
            model.add_adapter(name, made)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    vector = next(p for n, p in model.named_parameters() if "overhead" in n and "sum" in n)
    return float(vector.mean())


@row("an adapter that is added inside `rescale_adapter_scale`", peft=Raises(KeyError), ours=True)
def _(library, folder):
    model = graft(library, ["head"])
    with module(library, "helpers").rescale_adapter_scale(model, 0.5):
        model.add_adapter("b", config(library, ["head"]))
    model.set_adapter("b")
    return bool(torch.isfinite(model(X)).all())


@row("`scale_layer` on an embedding", peft=1.0, ours=0.5)
def _(library, folder):
    base = nn.Sequential(nn.Embedding(4, 8))
    model = graft(library, ["0"], base=base, lora_alpha=2)
    (layer,) = layers(model)
    layer.scale_layer(0.5)
    return layer.scaling["a"]


@row("`convert_to_lora` of HiRA, AdaLoRA, OFT or IA3", peft=Raises(TypeError), ours=True)
def _(library, folder):
    hira = library.HiraConfig(target_modules=["0"], r=2)
    model = library.get_peft_model(nn.Sequential(nn.Linear(8, 4)), hira)
    _, state = library.convert_to_lora(model, 2)
    return len(state) == 2


@row(
    "`reduce_intruder_dimension` of a DoRA",
    peft=True,
    ours=Raises(UnsupportedError, "uses `dora`, whose effect"),
)
def _(library, folder):
    name = "tuners.lora" if library.__name__ == "peft" else "combine"
    model = graft(library, ["head"], use_dora=True)
    reduce = module(library, f"{name}.intruders").reduce_intruder_dimension
    reduce(model, "a", "b", logging_sink=None)
    return model.active_adapters == ["b"]


def fa_step(library: Any, model: Any) -> bool:
    """Whether a step of LoRA-FA changes the active adapter."""
    optimizer = module(library, "optimizers").create_lorafa_optimizer(
        model, r=2, lora_alpha=8, lr=0.1
    )
    before = [p.detach().clone() for p in model.parameters()]
    model(X).square().mean().backward()
    optimizer.step()
    return not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@row("LoRA-FA beside an adapter that does not train", peft=Raises(TypeError), ours=True)
def _(library, folder):
    return fa_step(library, graft_two(library, ["head"]))


@row("LoRA-FA on convolutions", peft=Raises(RuntimeError), ours=True)
def _(library, folder):
    layer = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 3, 2))
    return fa_step(library, graft(library, ["1"], base=layer))


@row("the gradients after a step of the Riemannian optimiser", peft=False, ours=True)
def _(library, folder):
    model = graft(library, ["head"])
    make = module(library, "optimizers").create_riemannian_optimizer
    optimizer = make(model, torch.optim.SGD, lr=0.1)
    model(X).square().mean().backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in trained]
    optimizer.step()
    return all(near(a, p.grad) for a, p in zip(before, trained, strict=True))


@row("a closure for the Riemannian optimiser", peft=Raises(ValueError, "closures"), ours=True)
def _(library, folder):
    model = graft(library, ["head"])
    make = module(library, "optimizers").create_riemannian_optimizer
    optimizer = make(model, torch.optim.SGD, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    return bool(optimizer.step(closure) < first)
