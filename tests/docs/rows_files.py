"""Rows about files: what is written, what is read, and what is said of what does not fit."""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings

import torch
from safetensors.torch import load_file, save_file

from multigraft import CheckpointError, ConfigError
from tests.bases.nets import mixtral, seeded
from tests.docs.comparison import (
    CONFIG,
    WEIGHTS,
    Raises,
    X,
    config,
    graft,
    layers,
    llama,
    load,
    near,
    net,
    row,
    saved,
)
from tests.oracle import build
from tests.test_per_expert import dense, logits, old_state
from tests.test_per_expert import saved as old_experts


def first(tensors):
    return sorted(tensors)[0]


@row("a file that lacks tensors", peft=True, ours=Raises(CheckpointError, "missing from the file"))
def _(library, folder):
    return bool(load(library, saved(folder, lambda t: t.pop(first(t)))))


@row("a file with tensors that the model has no place for", peft=True, ours=Raises(CheckpointError))
def _(library, folder):
    extra = {"base_model.model.extra.lora_A.weight": torch.zeros(2, 8)}
    return bool(load(library, saved(folder, lambda t: t.update(extra))))


@row("a file with NaN", peft=True, ours=Raises(CheckpointError, "NaN or infinity"))
def _(library, folder):
    return bool(load(library, saved(folder, lambda t: t[first(t)].fill_(float("nan")))))


@row("a file with a tensor of another shape", peft=Raises(RuntimeError), ours=["b"])
def _(library, folder):
    saved(folder, lambda t: t.update({first(t): torch.zeros(3, 3)}))
    model = graft(library, name="b")
    try:
        model.load_adapter(folder, "c")
    except CheckpointError:
        return list(model.peft_config)


@row("what `load_adapter` returns", peft="_IncompatibleKeys", ours="LoadReport")
def _(library, folder):
    return type(graft(library).load_adapter(saved(folder), "b")).__name__


@row("`set_peft_model_state_dict` with missing tensors", peft=True, ours=Raises(CheckpointError))
def _(library, folder):
    model = graft(library)
    state = dict(library.get_peft_model_state_dict(model, adapter_name="a"))
    del state[first(state)]
    return bool(library.set_peft_model_state_dict(model, state, adapter_name="a"))


@row("`load_adapter` over an adapter", peft=1.0, ours=32.0)
def _(library, folder):
    model = graft(library, name="default", lora_alpha=2)
    model.load_adapter(saved(folder, lora_alpha=64), "default")
    return layers(model)[0].scaling["default"]


@row("keys of a config that the version does not know", peft=False, ours=True)
def _(library, folder):
    path = saved(folder / "old") / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_option": 3}))
    load(library, folder / "old").save_pretrained(folder / "new")
    return "new_option" in json.loads((folder / "new" / CONFIG).read_text())


@row("a config of a newer version", peft=False, ours=True)
def _(library, folder):
    path = saved(folder) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "99.0.0"}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load(library, folder)
    return any("99.0.0" in str(warning.message) for warning in told)


@row(
    "a switch of a config that is neither true nor false",
    peft=True,
    ours=Raises(ConfigError, "`use_rslora` (='false') must be True or False"),
)
def _(library, folder):
    path = saved(folder) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": "false"}))
    return load(library, folder).peft_config["default"].use_rslora == "false"


@row("a misspelt option of `from_pretrained`", peft=True, ours=Raises(CheckpointError, "'revison'"))
def _(library, folder):
    return bool(load(library, saved(folder), revison="main"))


@row("a folder that holds one adapter in a subfolder", peft=Raises(ValueError), ours=["default"])
def _(library, folder):
    graft(library, name="dates").save_pretrained(folder)
    return list(load(library, folder).peft_config)


@row("a base model other than the one trained on", peft=False, ours=True)
def _(library, folder):
    one, two = llama(), llama()
    one.name_or_path, two.name_or_path = "org/one", "org/two"
    graft(library, ["q_proj"], "default", one).save_pretrained(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load(library, folder, two)
    return any("org/one" in str(warning.message) for warning in told)


@row("`safe_serialization=False`", peft=True, ours=Raises(CheckpointError, "safetensors only"))
def _(library, folder):
    graft(library, name="default").save_pretrained(folder, safe_serialization=False)
    return (folder / "adapter_model.bin").is_file()


@row("`adapter_model.bin`", peft=True, ours=Raises(CheckpointError, "allow_pickle=True"))
def _(library, folder):
    saved(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return bool(load(library, folder))


@row("a file behind a link out of its folder", peft=True, ours=Raises(CheckpointError, "cp -L"))
def _(library, folder):
    place = saved(folder / "adapter")
    (place / WEIGHTS).rename(folder / WEIGHTS)
    (place / WEIGHTS).symlink_to(folder / WEIGHTS)
    return bool(load(library, place))


@row("a key twice in `adapter_config.json`", peft=True, ours=Raises(ConfigError, "`r` stands"))
def _(library, folder):
    text = (saved(folder) / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"r": 2', '"r": 3, "r": 2'))
    return bool(load(library, folder))


@row("an expression that could take for ever", peft=True, ours=Raises(ConfigError, "for ever"))
def _(library, folder):
    return bool(graft(library, r"(h*e*a*d*)*"))  # which has names of a few letters to try


@row('`save_embedding_layers="auto"`', peft=1, ours=0)
def _(library, folder):
    graft(library, ["embed_tokens"], "default", llama()).save_pretrained(folder)
    return len([key for key in load_file(folder / WEIGHTS) if "base_layer" in key])


@row("embedding matrices in a file", peft=False, ours=True)
def _(library, folder):
    base = llama()
    torch.nn.init.ones_(base.model.embed_tokens.weight)
    model = graft(library, ["q_proj"], "default", base)
    model.save_pretrained(folder, save_embedding_layers=True)
    fresh = build(llama)
    before = fresh.model.embed_tokens.weight.detach().clone()
    load(library, folder, fresh)
    own = fresh.model.embed_tokens
    return torch.equal(getattr(own, "base_layer", own).weight, before)


@row('`"all-linear"` in files', peft="blocks.0.down", ours="down")
def _(library, folder):
    graft(library, name="default").save_pretrained(folder)
    return min(json.loads((folder / CONFIG).read_text())["target_modules"])


@row(
    "a file of single experts that adapts `w1` and not `w3`",
    peft=Raises(ValueError, "without also targeting"),
    ours=True,
)
def _(library, folder):
    state = {k: v for k, v in old_state("mixtral").items() if ".w3." not in k}
    old_experts(folder, "mixtral", state, target_modules=["w1", "w2", "q_proj"])
    return near(logits(load(library, folder, seeded(mixtral))), logits(dense("mixtral", state)))


@row("a file of single experts with `use_rslora`", peft=False, ours=True)
def _(library, folder):
    state = old_state("mixtral")
    old_experts(folder, "mixtral", state, use_rslora=True)
    truth = logits(dense("mixtral", state, 6 / 2**0.5))
    return near(logits(load(library, folder, seeded(mixtral))), truth)


def swap_module(library):
    return importlib.import_module(f"{library.__name__}{PLACES[library.__name__]}")


PLACES = {"peft": ".utils.hotswap", "multigraft": ".hotswap"}


@row("hot-swapping an adapter with `rank_pattern`", peft=False, ours=True)
def _(library, folder):
    new = graft(library, ["up"], "default", rank_pattern={"up": 4})
    new.save_pretrained(folder)
    model = graft(library, ["up"], "default", r=4)
    swap_module(library).hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    return near(model(X), new(X))


@row("`config=` of `prepare_model_for_compiled_hotswap`", peft=4, ours=2)
def _(library, folder):
    coming = config(library, ["up"])
    model = graft(library, ["up"], "default")
    swap_module(library).prepare_model_for_compiled_hotswap(model, target_rank=4, config=coming)
    return coming.r


@row("hot-swapping an adapter that does not fit", peft=False, ours=True)
def _(library, folder):
    graft(library, ["up"], "default").save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    first, last = min(state), max(state)
    save_file(
        {k: v[:, :3] if k == last else v for k, v in state.items() if k != first}, folder / WEIGHTS
    )
    model = graft(library, ["up"], "default")
    before = model(X)
    with contextlib.suppress(RuntimeError, ValueError):
        swap_module(library).hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    return near(model(X), before)


@row("a compiled base", peft=True, ours=False)
def _(library, folder):
    base = torch.compile(net(), backend="eager")
    graft(library, ["up"], "default", base).save_pretrained(folder)
    return any("_orig_mod" in key for key in load_file(folder / WEIGHTS))


@row("a `README.md` in the folder", peft=False, ours=True)
def _(library, folder):
    (folder / "README.md").write_text("mine\n")
    graft(library).save_pretrained(folder)
    return (folder / "README.md").read_text() == "mine\n"


@row("a save that fails half-way", peft=False, ours=True)
def _(library, folder):
    before = (saved(folder) / WEIGHTS).read_bytes()
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    with contextlib.suppress(OSError, RuntimeError):
        graft(library, name="default", base=net().double()).save_pretrained(folder)
    return (folder / WEIGHTS).read_bytes() == before


@row("`get_base_model().save_pretrained()`", peft=False, ours=True)
def _(library, folder):
    base = build(llama)
    base.save_pretrained(folder / "before")
    options = library.LoraConfig(r=2, target_modules=["q_proj"])
    library.get_peft_model(base, options).get_base_model().save_pretrained(folder / "after")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("before", "after"))
    return before.keys() == after.keys()
