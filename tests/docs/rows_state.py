"""Rows about the lifecycle: active, disabled, merged, deleted; and mixed batches."""

from __future__ import annotations

import torch
from torch import nn

from multigraft import AdapterNameError, MergeError, StateError
from tests.docs.comparison import (
    Raises,
    X,
    config,
    flags,
    graft,
    graft_two,
    layers,
    llama,
    merged,
    near,
    net,
    row,
    saved,
)


@row("`model.set_adapter([…])`", peft=Raises(TypeError), ours=["a", "b"])
def _(library, folder):
    model = graft_two(library)
    model.set_adapter(["a", "b"])
    return model.active_adapters


@row(
    "`model.base_model.set_adapter` of an unknown name",
    peft=True,
    ours=Raises(AdapterNameError, "There are: `a`"),
)
def _(library, folder):
    model = graft(library)
    model.base_model.set_adapter("typo")
    return near(model(X), net()(X))


@row("`set_adapter` and flags set by hand", peft=False, ours=True)
def _(library, folder):
    model = graft_two(library)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".b." in name)
    model.set_adapter("a")
    return all(flags(model, "b"))


@row("`disable_adapter()` and `requires_grad`", peft=True, ours=False)
def _(library, folder):
    model = graft(library, inference_mode=True)
    with model.disable_adapter():
        pass
    return any(flags(model, "a"))


@row("`disable_adapter()` on a merged model", peft=[], ours=["a"])
def _(library, folder):
    model = graft(library)
    model.merge_adapter()
    with model.disable_adapter():
        assert near(model(X), net()(X))
    return merged(model)


@row("adding an adapter to a merged model", peft=[], ours=["a"])
def _(library, folder):
    model = graft(library)
    model.merge_adapter()
    model.add_adapter("b", config(library))
    return merged(model)


@row("merging one of several active adapters", peft=False, ours=True)
def _(library, folder):
    model = graft_two(library)
    model.base_model.set_adapter(["a", "b"])
    before = model(X)
    model.merge_adapter(["a"])
    return near(model(X), before)


@row("merging what is merged", peft=["a"], ours=Raises(StateError, "merged already"))
def _(library, folder):
    model = graft(library)
    model.merge_adapter()
    model.merge_adapter(["a"])
    return merged(model)


@row("`unmerge_adapter([…])`", peft=Raises(TypeError), ours=["b"])
def _(library, folder):
    model = graft_two(library)
    model.merge_adapter(["a", "b"])
    model.unmerge_adapter(["a"])
    return merged(model)


@row("unmerging", peft=False, ours=True)
def _(library, folder):
    model = graft(library, base=net().bfloat16())
    layer = layers(model)[0]
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    return torch.equal(layer.base_layer.weight, before)


@row("scaling a merged adapter", peft=False, ours=Raises(StateError, "while it is merged"))
def _(library, folder):
    model = graft(library)
    model.merge_adapter()
    for layer in layers(model):
        layer.set_scale("a", 3.0)
    model.unmerge_adapter()
    with model.disable_adapter():
        return near(model(X), net()(X))


@row("loading over a merged adapter", peft=False, ours=Raises(StateError, "is merged"))
def _(library, folder):
    saved(folder, lambda tensors: [tensor.fill_(0.5) for tensor in tensors.values()])
    model = graft(library, name="default")
    model.merge_adapter()
    model.load_adapter(folder, "default")
    model.unmerge_adapter()
    with model.disable_adapter():
        return near(model(X), net()(X))


@row("merging NaN", peft=True, ours=Raises(MergeError, "holds NaN or infinity"))
def _(library, folder):
    model = graft(library, ["head"])
    nn.init.constant_(layers(model)[0].lora_A["a"].weight, float("nan"))
    model.merge_adapter()
    return bool(model.get_base_model().head.base_layer.weight.isnan().any())


@row("merging into a parametrised weight (`weight_norm`, …)", peft=False, ours=True)
def _(library, folder):
    base = net()
    nn.utils.parametrizations.weight_norm(base.head)
    model = graft(library, ["head"], base=base)
    before = model(X)
    model.merge_adapter()
    return near(model(X), before)


@row("OFT on a padded convolution, merged", peft=False, ours=True)
def _(library, folder):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    options = {"target_modules": ["0"], "oft_block_size": 4, "init_weights": False}
    model = library.get_peft_model(base, library.OFTConfig(**options)).eval()
    x = torch.randn(2, 4, 5, 5)
    before = model(x)
    model.merge_adapter()
    return near(model(x), before)


@row(
    "`merge_and_unload()` inside `disable_adapter()`", peft=False, ours=Raises(StateError, "disab")
)
def _(library, folder):
    model = graft(library)
    with model.disable_adapter():
        return near(model.merge_and_unload()(X), net()(X))


@row("`merge_and_unload(adapter_names=…)` and saved modules", peft=False, ours=True)
def _(library, folder):
    model = graft_two(library, ["up"], modules_to_save=["head"])
    nn.init.ones_(model.get_base_model().head.modules_to_save["a"].weight)
    model.set_adapter("b")
    before = model(X)
    model.set_adapter("a")
    return near(model.merge_and_unload(adapter_names=["b"])(X), before)


@row("`unload()` and `requires_grad`", peft=False, ours=True)
def _(library, folder):
    return all(flags(graft(library).unload()))


@row("deleting the last adapter", peft=Raises(KeyError), ours=True)
def _(library, folder):
    model = graft(library)
    model.delete_adapter("a")
    return near(model(X), net()(X))


@row("an adapter added after the last was deleted", peft=[], ours=["n"])
def _(library, folder):
    model = graft(library)
    model.delete_adapter("a")
    model.add_adapter("n", config(library))
    return model.active_adapters


@row("deleting the active adapter", peft=(["b"], True), ours=(["b"], False))
def _(library, folder):
    model = graft_two(library)
    model.delete_adapter("a")
    return model.active_adapters, any(flags(model, "b"))


@row("`adapter_names` while training", peft=Raises(ValueError, "training mode"), ours=True)
def _(library, folder):
    model = graft_two(library).train()
    model.base_model.set_requires_grad(["a", "b"], True)
    model(X, adapter_names=["a", "b", "__base__"]).sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if ".lora_A." in n]
    return all(grad is not None for grad in grads)


@row("`adapter_names` with DoRA", peft=Raises(ValueError, "DoRA"), ours=True)
def _(library, folder):
    model = graft(library, use_dora=True)
    rows = model(X, adapter_names=["a", "a", "__base__"])
    return near(rows[:2], model(X[:2])) and near(rows[2:], net()(X[2:]))


@row("float32 adapters on a bfloat16 base", peft=torch.float32, ours=torch.bfloat16)
def _(library, folder):
    model = graft(library, ["q_proj"], base=llama().to(torch.bfloat16))
    layer = layers(model)[0]
    assert layer.lora_A["a"].weight.dtype == torch.float32
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = layer(x) - layer.base_layer(x)
    A, B = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    options = {}
    for dtype in (torch.float32, torch.bfloat16):
        h = x.to(dtype) @ A.T.to(dtype)
        change = layer.scaling["a"] * (h @ B.T.to(dtype))
        options[dtype] = (layer.base_layer(x) + change).bfloat16() - layer.base_layer(x)
    errors = {dtype: float((found - option).abs().sum()) for dtype, option in options.items()}
    return min(errors, key=errors.get)
