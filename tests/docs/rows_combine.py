"""Rows about combining adapters with weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from multigraft import AdapterNameError, ConfigError
from tests.docs.comparison import Raises, X, config, graft, graft_two, near, row


def combined(model: Any, weights: Any = (1.0,), rule: str = "cat", **more: Any) -> Any:
    """The model with the combination of its first adapters active."""
    names = list("abc"[: len(weights)])
    model.add_weighted_adapter(names, list(weights), "sum", rule, **more)
    model.base_model.set_adapter(["sum"])
    return model.eval()


def is_itself(library: Any, **options: Any) -> bool:
    """Whether the combination of one adapter, with weight 1, does what that adapter does."""
    model = graft(library, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".a." in name or name.endswith("lora_magnitude_vector.a"):
                parameter.add_(0.1)
    before = model(X)
    return near(combined(model)(X), before)


@row(
    "`add_weighted_adapter` under a name that exists",
    peft=None,
    ours=Raises(AdapterNameError, "`b` exists"),
)
def _(library, folder):
    return graft_two(library).add_weighted_adapter(["a"], [1.0], "b")


@row("combining rsLoRA", peft=False, ours=True)
def _(library, folder):
    return is_itself(library, use_rslora=True)


@row("combining DoRA", peft=False, ours=True)
def _(library, folder):
    return is_itself(library, use_dora=True)


@row("combining `lora_bias`", peft=False, ours=True)
def _(library, folder):
    return is_itself(library, lora_bias=True)


@row("combining saved modules", peft=False, ours=True)
def _(library, folder):
    return is_itself(library, target=["up"], modules_to_save=["head"])


@row("combining adapters that save the same module", peft=Raises(ValueError), ours=True)
def _(library, folder):
    model = graft_two(library, ["up"], modules_to_save=["head"])
    combined(model, [0.5, 0.5])
    heads = {n: p for n, p in model.named_parameters() if "head.modules_to_save" in n}
    return len(heads) == 6


@row("combining one adapter by a rule that leaves elements out", peft=True, ours=False)
def _(library, folder):
    model = graft(library)
    before = model(X)
    return near(combined(model, rule="magnitude_prune", density=0.3)(X), before)


@row(
    "combining adapters with filters of their own",
    peft=["blocks.1.up"],
    ours=["blocks.0.up", "blocks.1.up"],
)
def _(library, folder):
    model = graft(library, ["up"], exclude_modules=["blocks.0.up"])
    model.add_adapter("b", config(library, ["up"]))
    combined(model, [1.0, 1.0])
    names = [n for n, _ in model.named_parameters() if ".lora_A.sum" in n]
    return sorted({n.split(".lora_A")[0].removeprefix("base_model.model.") for n in names})


@row("`svd` on `nn.Conv1d` and `nn.Conv3d`", peft=Raises(RuntimeError), ours=True)
def _(library, folder):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv1d(4, 6, 3)).eval(), torch.randn(2, 4, 7)
    model = graft(library, ["0"], base=base)
    model.add_adapter("b", config(library, ["0"]))
    before = model(x)
    return near(combined(model, [1.0, 0.0], "svd")(x), before)


@row("`cat` on a convolution with `groups`", peft=False, ours=True)
def _(library, folder):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval(), torch.randn(2, 4, 7, 7)
    model = graft(library, ["0"], base=base)
    model.add_adapter("b", config(library, ["0"]))
    before = model(x)
    return near(combined(model, [1.0, 0.0], "cat")(x), before)


@row("combining adapters of parameters", peft=Raises(ValueError), ours=True)
def _(library, folder):
    model = graft(library, [], target_parameters=["up.weight"])
    before = model(X)
    return near(combined(model)(X), before)


@row("fewer weights than adapters", peft=True, ours=Raises(ConfigError, "one number for each"))
def _(library, folder):
    model = graft_two(library)
    before = model(X)
    model.add_weighted_adapter(["a", "b"], [1.0], "sum", "cat")
    model.base_model.set_adapter(["sum"])
    return near(model.eval()(X), before)


@row("a combination that fails half-way", peft=["a", "b", "sum"], ours=["a", "b"])
def _(library, folder):
    model = graft_two(library)
    try:
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "ties")  # without a density
    except (TypeError, ConfigError):
        return list(model.peft_config)
    return None


@row("`dare_*` under a seed", peft=False, ours=True)
def _(library, folder):
    model = graft_two(library, ["head"])
    torch.manual_seed(0)
    combined(model, [1.0, 1.0], "dare_linear", density=0.5)
    torch.manual_seed(0)
    masks = [torch.bernoulli(torch.full((2, 8), 0.5)) for _ in "ab"]
    found = next(p for n, p in model.named_parameters() if "head.lora_A.sum" in n)
    return bool(torch.equal(found == 0, sum(masks) == 0))
