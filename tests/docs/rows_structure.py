"""Rows about targets, names, configs and the layers themselves."""

from __future__ import annotations

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from multigraft import AdapterNameError, ConfigError, TargetError, UnsupportedError
from tests.bases.nets import mixtral, seeded
from tests.docs.comparison import (
    WEIGHTS,
    Raises,
    X,
    adapted,
    config,
    graft,
    graft_two,
    layers,
    llama,
    near,
    net,
    row,
)


@row('`"all-linear"` beside a saved head', peft=Raises(KeyError), ours=True)
def _(library, folder):
    model = graft(library, base=llama(), task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model.add_adapter("b", config(library, task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    return "lm_head" not in adapted(model)


@row("LoRA on a module that another adapter saves", peft=Raises(ValueError), ours=["head"])
def _(library, folder):
    model = graft(library, ["up"], modules_to_save=["head"])
    model.add_adapter("b", config(library, ["head"]))
    model.delete_adapter("a")
    return adapted(model)


@row("an adapter that fails half-way", peft=["b"], ours=[])
def _(library, folder):
    model = graft(library, ["up"], base=nn.ModuleDict({"up": nn.Linear(8, 8), "act": nn.ReLU()}))
    model.get_base_model()["down"] = nn.Linear(8, 8)
    model.get_base_model()["last"] = nn.ReLU()
    try:
        model.add_adapter("b", config(library, ["down", "last"]))
    except ValueError:
        return sorted({n.split(".")[-2] for n, _ in model.named_parameters() if ".b." in n})


@row(
    "a target that matches nothing",
    peft=["blocks.0.up", "blocks.1.up"],
    ours=Raises(TargetError, "Nearest: `down`"),
)
def _(library, folder):
    return adapted(graft(library, ["up", "dwon"]))


@row("`modules_to_save` that matches nothing", peft=True, ours=Raises(TargetError, "`head`"))
def _(library, folder):
    return bool(graft(library, ["up"], modules_to_save=["haed"]))


@row("`modules_to_save` and longer names", peft=["head", "overhead"], ours=["head"])
def _(library, folder):
    model = graft(library, ["up"], modules_to_save=["head"])
    names = [n for n, _ in model.named_parameters() if ".modules_to_save." in n]
    return sorted({name.split(".")[2] for name in names})


@row(
    "`exclude_modules` that matches nothing",
    peft=["blocks.0.up", "blocks.1.up"],
    ours=Raises(TargetError),
)
def _(library, folder):
    return adapted(graft(library, ["up"], exclude_modules=["nope"]))


@row(
    "`rank_pattern`, `alpha_pattern` that match nothing",
    peft=["blocks.0.up", "blocks.1.up"],
    ours=Raises(TargetError),
)
def _(library, folder):
    return adapted(graft(library, ["up"], rank_pattern={"nope": 4}))


@row('`["all-linear"]`', peft=Raises(ValueError, "not found"), ours=6)
def _(library, folder):
    return len(adapted(graft(library, ["all-linear"])))


@row(
    '`"all-linear"` in a list with other names',
    peft=["blocks.0.up", "blocks.1.up"],
    ours=Raises(ConfigError, "stands alone"),
)
def _(library, folder):
    return adapted(graft(library, ["all-linear", "up"]))


@row(
    "a full path against `layers_to_transform`",
    peft=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
    ours=Raises(TargetError, "in full"),
)
def _(library, folder):
    target = ["model.layers.0.self_attn.q_proj", "v_proj"]
    return adapted(graft(library, target, base=llama(), layers_to_transform=[1]))


@row(
    "a layer index that the model lacks",
    peft=["model.layers.1.self_attn.q_proj"],
    ours=Raises(TargetError, "no layers [7]"),
)
def _(library, folder):
    return adapted(graft(library, ["q_proj"], base=llama(), layers_to_transform=[1, 7]))


@row(
    "`layers_to_transform` where nothing stands before the layers",
    peft=Raises(ValueError, "not found"),
    ours=["blocks.1.up"],
)
def _(library, folder):
    return adapted(graft(library, ["up"], layers_to_transform=[1]))


@row("one module under two names", peft=False, ours=True)
def _(library, folder):
    base = net()
    base.blocks[1].up = base.blocks[0].up
    model = graft(library, ["up"], base=base)
    before = model(X)
    model.merge_adapter()
    return near(model(X), before)


@row("a model that has an adapter of that name", peft=0.0, ours=Raises(AdapterNameError, "exists"))
def _(library, folder):
    base = net()
    model = graft(library, base=base, init_lora_weights=True)
    nn.init.ones_(layers(model)[0].lora_B["a"].weight)
    graft(library, base=base, init_lora_weights=True)
    return float(layers(model)[0].lora_B["a"].weight.sum())


@row(
    "`get_peft_model` on a `PeftModel`",
    peft="base_model.model.base_model.model.blocks.0.down.lora_A.weight",
    ours="base_model.model.blocks.0.down.lora_A.weight",
)
def _(library, folder):
    outer = library.get_peft_model(graft(library), config(library), adapter_name="b")
    outer.save_pretrained(folder, selected_adapters=["b"])
    return min(load_file(folder / "b" / WEIGHTS))


@row("adapters named `v1.0`, `keys`", peft=["KeyError", "KeyError"], ours=["b", "b"])
def _(library, folder):
    found = []
    for name in ("v1.0", "keys"):
        model = graft(library)
        try:
            model.add_adapter(name, config(library))
            found.append("b")
        except KeyError as error:
            found.append(type(error).__name__)
    return found


@row("adapters named `a/b`, `..` or nothing", peft=True, ours=Raises(AdapterNameError, "folder"))
def _(library, folder):
    graft(library, name="a/b").save_pretrained(folder)
    return (folder / "a" / "b" / WEIGHTS).is_file()


@row("an adapter named like a module", peft=16, ours=28)
def _(library, folder):
    model = graft(library, name="default", base=llama())
    model.add_adapter("mlp", config(library))
    model.save_pretrained(folder, selected_adapters=["default"])
    return len(load_file(folder / WEIGHTS))


@row("modules with names like `flora_enc`", peft=2, ours=0)
def _(library, folder):
    base = net()
    base.flora_enc = nn.Linear(8, 8)
    model = graft(library, ["flora_enc"], base=base)
    model.add_adapter("b", config(library, ["flora_enc"]))
    model.delete_adapter("b")
    return len([n for n, _ in model.named_parameters() if ".b." in n])


@row("the config that you pass", peft=(True, False), ours=(False, True))
def _(library, folder):
    given = config(library)
    model = library.get_peft_model(net(), given, adapter_name="a")
    return model.peft_config["a"] is given, given.target_modules == "all-linear"


@row(
    "a config of the other library",
    peft=True,
    ours=Raises(UnsupportedError, "must be a config of Multigraft"),
)
def _(library, folder):
    return bool(library.get_peft_model(net(), peft.LoraConfig(target_modules=["up"])))


@row("different methods on one model", peft=Raises(ValueError, "different"), ours=["a", "b"])
def _(library, folder):
    model = graft(library)
    model.add_adapter("b", library.IA3Config(target_modules=["up"], feedforward_modules=[]))
    return list(model.peft_config)


@row("`PeftMixedModel.save_pretrained`", peft=Raises(NotImplementedError), ours=True)
def _(library, folder):
    model = library.get_peft_model(net(), config(library), mixed=True)
    assert type(model).__name__ == "PeftMixedModel"
    model.save_pretrained(folder)
    return any(folder.iterdir())


@row("OFT activated after LoRA on one layer", peft=False, ours=True)
def _(library, folder):
    outputs = []
    for order in (["a", "b"], ["b", "a"]):
        torch.manual_seed(0)
        turn = library.OFTConfig(target_modules=["up"], oft_block_size=4, init_weights=False)
        made = {"a": config(library, ["up"]), "b": turn}
        model = library.get_peft_model(net(), made[order[0]], order[0], mixed=True)
        model.add_adapter(order[1], made[order[1]])
        for name, parameter in model.named_parameters():
            if "lora_" in name or "oft_" in name:
                nn.init.constant_(parameter, 0.1)
        model.set_adapter(order)
        outputs.append(model.eval()(X))
    return near(*outputs)


@row("`bias` in more than one adapter", peft=Raises(ValueError, "only 1"), ours=["a", "b"])
def _(library, folder):
    return list(graft_two(library, bias="all").peft_config)


@row("`bias` of a disabled adapter", peft=False, ours=True)
def _(library, folder):
    model = graft(library, ["up"], bias="lora_only")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            nn.init.ones_(parameter)
    with model.disable_adapter():
        return near(model(X), net()(X))


DEEPER = {"layer_replication": [[0, 1], [0, 1]]}


@row("`layer_replication` and a second adapter", peft=False, ours=True)
def _(library, folder):
    model = graft(library, ["q_proj"], base=llama(), **DEEPER)
    own = model.base_model.model.model.layers
    model.add_adapter("b", config(library, ["q_proj"], **DEEPER))
    return model.base_model.model.model.layers is own


@row("merging beside `layer_replication`", peft=False, ours=True)
def _(library, folder):
    model = graft(library, ["q_proj"], base=llama(), **DEEPER).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    return near(model.merge_and_unload()(input_ids=ids).logits, before)


TIED = {"ensure_weight_tying": True, "task_type": "CAUSAL_LM"}


@row("merging under `ensure_weight_tying`", peft=False, ours=True)
def _(library, folder):
    base = llama(tie_word_embeddings=True)
    model = graft(library, ["embed_tokens"], base=base, **TIED)
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    return near(model.merge_and_unload()(input_ids=ids).logits / 10, before / 10)


@row("training under `ensure_weight_tying`", peft=4, ours=2)
def _(library, folder):
    base = llama(tie_word_embeddings=True)
    model = graft(library, ["embed_tokens"], base=base, **TIED)
    return sum(p.requires_grad for p in model.parameters())


@row(
    "options that are not built",
    peft=True,
    ours=Raises(ConfigError, "`layer_replication`"),
)
def _(library, folder):
    return bool(library.AdaLoraConfig(total_step=9, layer_replication=[(0, 1)]))


@row("`nn.TransformerEncoderLayer` in evaluation", peft=False, ours=True)
def _(library, folder):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = graft(library, ["linear1"], base=encoder)
    x = X.reshape(1, 3, 8)
    with torch.no_grad():
        return near(model.eval()(x), model.train()(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


@row("`out_proj` of `nn.MultiheadAttention`", peft=(False, False), ours=(True, True))
def _(library, folder):
    torch.manual_seed(0)
    base, x = Attention(), X.reshape(1, 3, 8)
    before = base(x)
    model = graft(library, ["out_proj"], base=base)
    acting = model(x)
    model.merge_adapter()
    return not near(acting, before), near(model(x), acting)


EXPERTS = {"target_parameters": ["experts.down_proj"]}


@row(
    "`lora_dropout` beside `target_parameters`", peft=Raises(ValueError, "lora_dropout"), ours=True
)
def _(library, folder):
    model = graft(library, [], base=seeded(mixtral), lora_dropout=0.5, **EXPERTS)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        return not near(model.train()(ids).logits, model.eval()(ids).logits)


@row("`adapter_names` and `target_parameters`", peft=Raises(ValueError, "mixed"), ours=True)
def _(library, folder):
    model = graft(library, [], base=seeded(mixtral), **EXPERTS)
    ids = torch.tensor([[1, 2, 3]] * 2)
    with torch.no_grad():
        first, second = model(input_ids=ids, adapter_names=["a", "__base__"]).logits
        return near(first, model(ids).logits[0]) and not near(first, second)


@row("`layer.lora_A[name](x)`", peft=(3, 2), ours=Raises(NotImplementedError))
def _(library, folder):
    return tuple(layers(graft(library, ["up"]))[0].lora_A["a"](X).shape)


@row("`layer.lora_dropout[name]`", peft="Dropout", ours="float")
def _(library, folder):
    layer = layers(graft(library, ["up"], lora_dropout=0.1))[0]
    return type(layer.lora_dropout["a"]).__name__
