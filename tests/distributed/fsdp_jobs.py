"""What each rank does in the tests of FSDP2."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from multigraft import (
    CheckpointError,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    TargetError,
    get_peft_model,
)
from multigraft.distributed import Replicas, fill_base, load_base, shard
from multigraft.whole import is_parted
from tests.distributed.counting import Collectives
from tests.distributed.replica_jobs import Result, launched, rank, share_any, states, train
from tests.distributed.tiny import adapted, base, batch, lora, loss_of, share

METHODS: dict[str, Any] = {
    "dora": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "pissa": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"),
    "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
"""Methods that read the base's weights, stand in for them, or act elsewhere."""


def gradients(method: str, how: str) -> dict[str, Tensor]:
    """An adapter's gradients after a step, and the tensors that it began with.

    Args:
        how: ``alone``, or sharded ``before`` or ``after`` attaching.
    """
    model: Any = base(torch.float32)
    if how == "before":
        shard(model)
    torch.manual_seed(3)
    model = get_peft_model(model, METHODS[method])
    replicas = shard(model) if how == "after" else Replicas(model) if how == "before" else None
    with torch.no_grad():
        for parameter in model.roster.parameters("default"):
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    loss_of(model, batch(0) if how == "alone" else share(batch(0))).backward()
    if replicas is not None:
        replicas.reduce()
    own = list(model.roster.parameters("default"))
    assert all(p.grad is not None for p in own if p.requires_grad)
    found = {f"gradient {i}": p.grad for i, p in enumerate(own) if p.grad is not None}
    return {**found, **states(model)}


def of_transformers(folder: str) -> tuple[bool, float, list[Tensor]]:
    """Whether a base that transformers sharded while loading is in parts; loss and gradients."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with launched():
        bare: Any = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(fsdp_size=2), attn_implementation="eager"
        )
    is_in_parts = is_parted(bare.lm_head.weight)
    model = adapted(bare, "a", "b")
    replicas = Replicas(model)
    loss = loss_of(model, share(batch(0)))
    loss.backward()
    replicas.reduce()
    gradients = [p.grad for p in model.roster.parameters("a") if p.grad is not None]
    return is_in_parts, replicas.mean(loss.detach()), gradients


def copy_refused() -> str:
    model: Any = base(torch.float32)
    shard(model)
    try:
        get_peft_model(model, METHODS["head"])
    except TargetError as error:
        return str(error)
    return ""


def is_sharded(model: PeftModel) -> bool:
    """Whether every tensor of the base lies in parts, and no adapter's does."""
    own = {id(p) for name in model.peft_config for p in model.roster.parameters(name)}
    return all(is_parted(p) != (id(p) in own) for p in model.parameters())


def trained(
    how: str, names: tuple[str, ...], plan: list[Any], folder: str, shape: tuple[int, ...] = ()
) -> tuple[Result, bool]:
    """Losses and adapters after training, saved by all ranks.

    Args:
        how: ``before`` the adapters are attached, ``after``, or ``sharded`` with them.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("over", "inside")) if shape else None
    model: Any = base(torch.float32)
    if how == "before":
        shard(model, mesh)
    model = adapted(model, *names)
    if how == "before":
        reduce = Replicas(model)
    else:
        reduce = shard(model, mesh, adapters="sharded" if how == "sharded" else "replicated")
    losses = train(model, model, plan, share_any, reduce.reduce)
    flag = is_sharded(model)
    model.save_pretrained(folder, is_main_process=rank() == 0)
    return ([reduce.mean(loss) for loss in losses], states(model)), flag


def alone(names: tuple[str, ...], plan: list[Any], folder: str, dtype: Any) -> Result:
    model = adapted(base(dtype), *names)
    losses = train(model, model, plan, lambda rows: rows, lambda: None)
    model.save_pretrained(folder)
    return losses, states(model)


def collectives(how: str, adapters: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Of one step: how many, how many bytes, and an adapter's bytes."""
    model = adapted(base(torch.float32), *"abcdefgh"[:adapters])
    replicas = shard(model, adapters=how)
    size = sum(p.numel() * 4 for p in model.roster.parameters("a"))
    for step in range(2):
        with Collectives() as seen:
            loss_of(model, share(batch(step))).backward()
            replicas.reduce()
    return dict(seen.calls), dict(seen.bytes), size


def mixed_dtypes() -> tuple[set[str], set[str], list[float]]:
    """Dtypes of the base and of an adapter, and losses, of a bfloat16 base."""
    model = adapted(base(torch.bfloat16), "a")
    replicas = shard(model)
    losses = train(model, model, [{"active": ["a"]}] * 2, share_any, replicas.reduce)
    own = {id(p) for p in model.roster.parameters("a")}
    kinds = {str(p.dtype) for p in model.parameters() if id(p) not in own}
    theirs = {str(p.dtype) for p in model.roster.parameters("a")}
    return kinds, theirs, [replicas.mean(loss) for loss in losses]


def merged(method: str | None = None) -> tuple[float, float, float, bool]:
    """How far logits are apart: merged from not, unmerged from not; and bits of the base."""
    model: Any = base(torch.float32)
    if method is None:
        model = adapted(model, "a")
    else:
        torch.manual_seed(3)
        model = get_peft_model(model, METHODS[method])
    shard(model)
    ids = batch(0)
    with torch.no_grad():
        for parameter in model.roster.parameters(model.active_adapters[0]):
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        weights = [p.to_local().clone() for p in model.parameters() if is_parted(p)]
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
        model.merge_adapter()
        pairs = zip(weights, parted(model), strict=True)
        assert not all(torch.equal(w, p.to_local()) for w, p in pairs)
        inside = model(input_ids=ids).logits
        model.unmerge_adapter()
        after = model(input_ids=ids).logits
    same = all(torch.equal(w, p.to_local()) for w, p in zip(weights, parted(model), strict=True))
    return (
        float((before - plain).abs().max()),
        float((before - inside).abs().max()),
        float((before - after).abs().max()),
        same,
    )


def parted(model: Any) -> list[Any]:
    return [p for p in model.parameters() if is_parted(p)]


def loaded(folder: str, late: bool) -> tuple[Tensor, list[int], bool]:
    """Logits of a base that was read in parts; sizes of the parts; whether ties hold."""
    model: Any = load_base(folder)
    sizes = [p.to_local().numel() for p in model.parameters()]
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    if late:
        torch.manual_seed(rank())  # the first rank's values are to count
        model = get_peft_model(model, lora(init_lora_weights=False))
        Replicas(model)
    with torch.no_grad():
        return model(input_ids=batch(0)).logits, sizes, is_tied


def attached_on_meta(folder: str) -> tuple[Tensor, Tensor]:
    """Logits with an adapter that was attached before there were values, and with its file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{folder}/base"))
    shard(bare)
    fill_base(bare, f"{folder}/base")
    model = PeftModel.from_pretrained(bare, f"{folder}/adapter")
    with torch.no_grad():
        return model(input_ids=batch(0)).logits, batch(0)


def refused(folder: str) -> str:
    try:
        load_base(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def own_bytes() -> int:
    """Memory of this process alone: pages of mapped files are everybody's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def memory(folder: str) -> int:
    """By how many bytes this process grows at most while it loads a base."""
    before, largest, is_done = own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not is_done.wait(0.002):
            largest = max(largest, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(folder)
    is_done.set()
    watcher.join()
    del model
    return largest - before
