"""Rows about variants of LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import multigraft
from multigraft import ConfigError, RoutingError, StateError, UnsupportedError
from multigraft.variants import monteclora
from tests.docs.comparison import Raises, X, config, graft, layers, llama, near, net, row
from tests.storage.cases import CASES as STORAGES

INVOKED = torch.tensor([[5, 6, 7, 8], [3, 4, 5, 6]])
PLAIN = torch.tensor([[7, 8, 9, 3], [3, 4, 9, 8]])


def alora(library: Any, **options: Any) -> Any:
    """A tiny language model with an aLoRA `a` that is invoked by 5, 6."""
    torch.manual_seed(0)
    chosen = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6], "lora_alpha": 32}
    return graft(library, ["q_proj", "v_proj"], base=llama().eval(), **(chosen | options))


def base_of(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with model.disable_adapter():
        return model(*args, **kwargs).logits


def written(model: Any, **options: Any) -> Tensor:
    return model.generate(input_ids=INVOKED, max_new_tokens=8, min_new_tokens=8, **options)


@row(
    "`alora_invocation_tokens` and `generate(use_cache=False)`",
    peft=False,
    ours=True,
)
def _(library, folder):
    model = alora(library)
    with torch.no_grad():
        ids = written(model)
        return bool(torch.equal(written(model, use_cache=False), ids))


@row("an aLoRA and `inputs_embeds`", peft=True, ours=Raises(RoutingError, "`alora_offsets`"))
def _(library, folder):
    model = alora(library)
    embedded = model.get_input_embeddings()(INVOKED)
    return near(model(inputs_embeds=embedded).logits, base_of(model, inputs_embeds=embedded))


@row("an aLoRA in a loop over a cache", peft=True, ours=Raises(RoutingError, "`alora_offsets`"))
def _(library, folder):
    model = alora(library)
    with torch.no_grad():
        first, again = (model(INVOKED, use_cache=True).past_key_values for _ in range(2))
        found = model(PLAIN[:, :1], past_key_values=first).logits
        return near(found, base_of(model, PLAIN[:, :1], past_key_values=again))


@row("an aLoRA on a model that is called by itself", peft=True, ours=Raises(StateError))
def _(library, folder):
    model = alora(library)
    return near(model.get_base_model()(INVOKED).logits, base_of(model, INVOKED))


@row("two aLoRAs active at once", peft=True, ours=False)
def _(library, folder):
    """Whether the second one, with another invocation, acts where the first one does."""
    model, changed = alora(library), []
    options = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = library.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[9], **options)
    model.add_adapter("b", config)
    with torch.no_grad():
        for both in (False, True):
            model.base_model.set_adapter(["a", "b"] if both else ["a"])
            changed.append(model(INVOKED).logits)
    return not near(*changed)


@row(
    "an aLoRA and beams",
    peft=Raises(ValueError, "Beam search not yet supported"),
    ours=True,
)
def _(library, folder):
    return written(alora(library), num_beams=2).shape == (2, 12)


@row(
    "an aLoRA under gradient checkpointing, two forwards before the first backward",
    peft=Raises(ValueError, "Multiple invocations"),
    ours=True,
)
def _(library, folder):
    model = alora(library)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(ids, labels=ids).loss for ids in (INVOKED, PLAIN)]
    sum(losses).backward()
    return True


@row("`alora_invocation_tokens=[]`", peft=False, ours=Raises(ConfigError))
def _(library, folder):
    model = alora(library, alora_invocation_tokens=[])
    return near(model(PLAIN).logits, base_of(model, PLAIN))


@row(
    "combining aLoRAs of different invocations",
    peft=[5, 6],
    ours=Raises(UnsupportedError, "act from different tokens"),
)
def _(library, folder):
    model = alora(library)
    options = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [9], "r": 2}
    model.add_adapter("b", library.LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    return model.peft_config["sum"].alora_invocation_tokens


@row("`use_qalora` on layers that are not GPTQ's", peft=8, ours=2)
def _(library, folder):
    model = graft(library, ["up"], use_qalora=True, qalora_group_size=4)
    return next(p for n, p in model.named_parameters() if "lora_A" in n).shape[1]


@row(
    "`use_bdlora` with blocks of B on transformers' `Conv1D`",
    peft=Raises(AttributeError),
    ours=(6, 1),
)
def _(library, folder):
    options = {"use_bdlora": {"target_modules_bd_b": ["0"], "nblocks": 2}}
    model = graft(library, ["0"], base=nn.Sequential(Conv1D(6, 8)), **options)
    return tuple(next(p for n, p in model.named_parameters() if "lora_B" in n).shape)


def experts(folder: Path, count: int = 2, **options: Any) -> list[str]:
    """Adapters on disk."""
    paths = []
    for index in range(count):
        torch.manual_seed(10 + index)
        model = graft(multigraft, ["q_proj"], "default", llama(), **options)
        paths.append(str(folder / f"{len(list(folder.iterdir()))}"))
        model.save_pretrained(paths[-1])
    return paths


def arrow(library: Any, folder: Path, paths: list[str] | None = None, **options: Any) -> Any:
    """A router over two adapters, or over those in `paths`."""
    torch.manual_seed(0)
    base, general = llama().eval(), experts(folder, 1) if options.get("use_gks") else None
    config = library.ArrowConfig(**{"top_k": 2, "rng_seed": 0, **options})
    model = library.create_arrow_model(base, paths or experts(folder), config, general)
    return model.eval()


def values(model: Any, name: str) -> Tensor:
    """One adapter's first factor."""
    found = (p for n, p in model.named_parameters() if n.endswith(f"lora_A.{name}.weight"))
    return next(found).detach().clone()


@row("experts under GenKnowSub", peft=False, ours=True)
def _(library, folder):
    model = arrow(library, folder, use_gks=True)
    before = values(model, "task_0")
    model(PLAIN)
    return bool(torch.equal(values(model, "task_0"), before))


@row("Arrow without a seed", peft=False, ours=True)
def _(library, folder):
    paths = experts(folder)
    first, second = (arrow(library, folder, paths, rng_seed=None) for _ in range(2))
    torch.manual_seed(1)
    one = first(PLAIN).logits
    torch.manual_seed(2)
    return bool(torch.equal(second(PLAIN).logits, one))


@row("`top_k` above the number of experts", peft=Raises(RuntimeError), ours=True)
def _(library, folder):
    arrow(library, folder, top_k=3)(PLAIN)
    return True


@row("experts of different ranks", peft=Raises(ValueError, "rank mismatch"), ours=True)
def _(library, folder):
    arrow(library, folder, experts(folder, 1) + experts(folder, 1, r=3))(PLAIN)
    return True


@row("an adapter that is added to an Arrow model", peft=False, ours=True)
def _(library, folder):
    """Whether it leaves the router's outputs alone."""
    model = arrow(library, folder)
    before = model(PLAIN).logits
    model.load_adapter(experts(folder, 1)[0], "bystander")
    model.set_adapter("arrow_router")
    return near(model(PLAIN).logits, before)


@row("a router's file", peft=Raises(AttributeError), ours=True)
def _(library, folder):
    model = arrow(library, folder)
    expected = model(PLAIN).logits
    model.save_pretrained(folder / "all")
    torch.manual_seed(0)
    again = library.PeftModel.from_pretrained(llama(), folder / "all" / "task_0", "task_0")
    for name in ("task_1", "arrow_router"):
        again.load_adapter(folder / "all" / name, name)
    again.set_adapter("arrow_router")
    return near(again.eval()(PLAIN).logits, expected)


@row("the `ArrowConfig` that you pass", peft=["task_0", "task_1"], ours=None)
def _(library, folder):
    config = library.ArrowConfig()
    library.create_arrow_model(llama(), experts(folder), config)
    return config.task_adapter_names


@row("a KaSA adapter, disabled", peft=False, ours=True)
def _(library, folder):
    model = graft(library, ["up"], kasa_config={})
    with model.disable_adapter():
        return near(model(X), net()(X))


@row("KaSA and MonteCLoRA on 4-bit and 8-bit layers", peft=[False, False], ours=[True, True])
def _(library, folder):
    found = []
    for option, part in (("kasa_config", "lora_diag"), ("monteclora_config", "std_prior")):
        base = nn.Sequential(STORAGES["bnb-nf4"].build(nn.Linear(64, 64)))
        base.is_loaded_in_4bit = True
        model = graft(library, ["0"], base=base, **{option: {}})
        found.append(any(part in name for name, _ in model.named_parameters()))
    return found


@row("KaSA beside adapters without it", peft=Raises(ValueError, "KaSA"), ours=True)
def _(library, folder):
    model = graft(library, ["up"], kasa_config={})
    alone = model(X)
    model.add_adapter("b", config(library, ["up"]))
    return near(model(X), alone)


@row("the regularisers of KaSA and MonteCLoRA", peft=False, ours=True)
def _(library, folder):
    losses = []
    for options in ({"gamma": 0.0}, {"gamma": 1.0}):
        torch.manual_seed(0)
        chosen = {"task_type": "CAUSAL_LM", "kasa_config": options}
        model = graft(library, ["q_proj"], base=llama().eval(), **chosen).train()
        losses.append(model(PLAIN, labels=PLAIN).loss)
    return not near(losses[0], losses[1])


@row("MonteCLoRA's divergence of the mixture", peft=False, ours=True)
def _(library, folder):
    alpha, prior = torch.tensor([0.4, 1.5, 2.0]), 0.1
    if library is multigraft:
        found = monteclora.dirichlet_kl(alpha, prior)
    else:
        options = {"num_samples": 3, "dirichlet_prior": prior}
        model = graft(library, ["up"], monteclora_config=options)
        found = layers(model)[0].lora_monteclora_sampler["a"].dirichlet_kl(alpha)
    there = torch.distributions.Dirichlet(torch.full((3,), prior))
    return near(
        found, torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), there)
    )


@row("MonteCLoRA under gradient checkpointing", peft=False, ours=True)
def _(library, folder):
    options = {"sample_scaler": 1.0, "num_samples": 2}
    model = graft(library, ["up"], monteclora_config=options).train()
    seen: list[Tensor] = []
    layers(model)[0].register_forward_hook(lambda *call: seen.append(call[2].detach()))
    torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False).sum().backward()
    return len(seen) == 2 and near(*seen)


@row("`batch_average_once` of a loaded VeLoRA", peft=False, ours=True)
def _(library, folder):
    options = {"init_type": "batch_average_once", "num_groups": 2}
    model = graft(library, ["up"], "default", velora_config=options).train()
    model(X)
    model.save_pretrained(folder)
    again = library.PeftModel.from_pretrained(net(), folder, is_trainable=True).train()
    before = {n: b.clone() for n, b in again.named_buffers() if "velora" in n}
    again(-2 * X[:1])
    return all(near(b, before[n]) for n, b in again.named_buffers() if "velora" in n)


@row('`init_lora_weights="mica"` on a float64 base', peft=Raises(TypeError), ours=True)
def _(library, folder):
    model = graft(library, ["up"], base=net().double(), init_lora_weights="mica")
    return near(model(X.double()), net().double()(X.double()))


class Mixture(nn.Module):
    """Weights of experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ W.T for W in self.stack]).sum(0)


@row("DoRA on fused experts", peft=Raises(ValueError, "dora"), ours=True)
def _(library, folder):
    chosen = {"target_parameters": ["stack"], "use_dora": True}
    model = graft(library, [], base=nn.Sequential(Mixture()), **chosen)
    return not near(model(X), nn.Sequential(Mixture())(X))
