"""What each rank does in the tests of distributed plans: one real step, its traffic counted."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multigraft import LoraConfig, get_peft_model
from multigraft.distributed import Replicas, TensorParallel, shard
from multigraft.planning.skeleton import checkpoint_blocks
from tests.distributed.counting import Collectives
from tests.distributed.tiny import TARGETS, loss_of

ROWS, TOKENS = 2, 16


def adapter(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=TARGETS)


def loaded(folder: str, is_parted: bool) -> Any:
    """The base that a test wrote; divided by transformers where asked for."""
    from transformers import AutoModelForCausalLM

    if not is_parted:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
    own["WORLD_SIZE"] = dist.get_world_size()
    os.environ.update({name: str(value) for name, value in own.items()})
    try:
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    finally:
        for name in own:
            del os.environ[name]


def local_bytes(tensor: Any) -> int:
    """What of a tensor lies on this rank."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.nbytes


def step(folder: str, strategy: str, rank: int, checkpointing: bool) -> dict[str, Any]:
    """Traffic of a training step, and bytes of this rank's weights and trained tensors."""
    base = loaded(folder, strategy == "tp")
    if checkpointing:
        checkpoint_blocks(base)
    torch.manual_seed(0)
    model = get_peft_model(base, adapter(rank)).train()
    parallel: Any = None
    if strategy == "ddp":
        parallel = Replicas(model)
    elif strategy == "fsdp":
        parallel = shard(model)
    elif strategy == "fsdp_sharded":
        parallel = shard(model, adapters="sharded")
    elif strategy == "tp":
        parallel = TensorParallel(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(dist.get_rank() if strategy != "tp" else 0)
    ids = torch.randint(0, 64, (ROWS, TOKENS), generator=generator)
    with Collectives() as seen:
        loss = loss_of(model, ids)
        loss.backward()
        if parallel is not None and strategy != "fsdp_sharded":
            parallel.reduce()
    parameters = {id(p): p for p in model.parameters()}
    return {
        "bytes": dict(seen.bytes),
        "calls": dict(seen.calls),
        "sizes": seen.sizes,
        "weights": sum(local_bytes(p) for i, p in parameters.items() if i not in trained),
        "trained": sum(local_bytes(p) for i, p in parameters.items() if i in trained),
    }
