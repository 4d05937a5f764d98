"""What each rank does in the tests of tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from multigraft import LoraConfig, PeftModel, UnsupportedError, get_peft_model
from multigraft.distributed import TensorParallel, load_sharded, save_sharded
from tests.distributed.counting import Collectives
from tests.distributed.plain import Net, ids_of, plain, plain_loss
from tests.distributed.replica_jobs import Result, launched, states, train
from tests.distributed.tiny import adapted, batch, loss_of


def parted_base(folder: str) -> Any:
    """Transformers' own tensor-parallel load."""
    from transformers import AutoModelForCausalLM

    with launched():
        return AutoModelForCausalLM.from_pretrained(
            folder, tp_plan="auto", attn_implementation="eager"
        )


def trained(
    folder: str, names: tuple[str, ...], plan: list[Any], save: str | None, options: dict[str, Any]
) -> tuple[Result, bool]:
    """Losses and adapters, and whether the factors lie as they should."""
    torch.manual_seed(dist.get_rank())
    model = adapted(parted_base(folder), *names, **options)
    parallel = TensorParallel(model)
    losses = train(model, model, plan, lambda rows: rows, parallel.reduce)
    if save is not None:
        model.save_pretrained(save)
    return (losses, states(model)), all(_lies_well(model, name) for name in names)


def _lies_well(model: PeftModel, name: str) -> bool:
    size = dist.get_world_size()
    attention = model.get_base_model().model.layers[0].self_attn
    column, row = attention.q_proj, attention.o_proj
    rank = column.r[name]
    shapes = [
        tuple(t.weight.to_local().shape)
        for layer in (column, row)
        for t in (layer.lora_A[name], layer.lora_B[name])
    ]
    return shapes == [(rank, 32), (32 // size, rank), (rank, 32 // size), (32, rank)]


def collectives(folder: str, is_adapted: bool) -> list[dict[str, int]]:
    """Of a forward, a backward, a reduce, and a forward without gradients."""
    model = parted_base(folder)
    if is_adapted:
        model = adapted(model, "a", "b")
        parallel = TensorParallel(model)
        model.set_adapter(["a", "b"])
    model.requires_grad_(is_adapted)
    x = model.get_input_embeddings()(batch(0)).detach().requires_grad_(True)
    found = []
    with Collectives() as seen:
        loss = model(inputs_embeds=x).logits.sum()
    found.append(seen.calls)
    with Collectives() as seen:
        loss.backward()
    found.append(seen.calls)
    with Collectives() as seen:
        if is_adapted:
            parallel.reduce()
    found.append(seen.calls)
    with Collectives() as seen, torch.no_grad():
        model(inputs_embeds=x)
    found.append(seen.calls)
    return [dict(calls) for calls in found]


def outputs(folder: str, save: str) -> dict[str, Tensor]:
    """Logits of an adapter that was loaded, merged, unmerged, disabled and unloaded."""
    base = parted_base(folder)
    model = PeftModel.from_pretrained(base, save)
    parallel = TensorParallel(model)
    model.load_adapter(save, "again")
    parallel.spread()
    found = {}
    with torch.no_grad():
        found["loaded"] = model(input_ids=batch(0)).logits
        model.merge_adapter()
        found["merged"] = model(input_ids=batch(0)).logits
        model.unmerge_adapter()
        found["unmerged"] = model(input_ids=batch(0)).logits
        with model.disable_adapter():
            found["disabled"] = model(input_ids=batch(0)).logits
        model.set_adapter("again")
        found["again"] = model(input_ids=batch(0)).logits
        rows = ["default", "__base__", "again", "default"]
        found["mixed"] = model(input_ids=batch(0), adapter_names=rows).logits
        found["unloaded"] = model.unload()(input_ids=batch(0)).logits
    assert "forward" in base.model.layers[0].self_attn.q_proj.__dict__
    return found


PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def with_parallelize_module(folder: str) -> tuple[float, float, dict[str, Tensor], dict[str, Any]]:
    """Torch's own plans: Adam on parted factors, and a sharded state."""
    torch.manual_seed(0)
    net = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles = {f"blocks.{i}.{name}": style() for i in range(2) for name, style in PLAN.items()}
    net = parallelize_module(net, mesh, styles)
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model = get_peft_model(net, config)
    parallel = TensorParallel(model)
    optimizer = torch.optim.AdamW(list(model.roster.parameters("default")), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    losses = []
    for step in range(4):
        loss = plain_loss(model, ids_of(step))
        loss.backward()
        parallel.reduce()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step == 1:
            save_sharded({**state, "step": 2}, folder)
    last = states(model)
    rest = load_sharded(state, folder)
    assert isinstance(next(iter(optimizer.state.values()))["exp_avg"], DTensor)
    for step in range(2, 4):
        plain_loss(model, ids_of(step)).backward()
        parallel.reduce()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in states(model).items():
        torch.testing.assert_close(value, last[key])
    return losses[0], losses[-1], last, rest


def plain_alone() -> tuple[float, float, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = plain("default")
    optimizer = torch.optim.AdamW(list(model.roster.parameters("default")), lr=1e-2)
    losses = []
    for step in range(4):
        loss = plain_loss(model, ids_of(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1], states(model)


def with_rows() -> Result:
    """Two ranks for the parts, and two for the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "parts"))
    torch.manual_seed(0)
    net = Net()
    styles = {f"blocks.{i}.{name}": style() for i in range(2) for name, style in PLAN.items()}
    parallelize_module(net, mesh["parts"], styles)
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model = get_peft_model(net, config)
    parallel = TensorParallel(model, mesh["rows"].get_group())
    optimizer = torch.optim.AdamW(list(model.roster.parameters("default")), lr=1e-2)
    losses = []
    for step in range(4):
        loss = plain_loss(model, ids_of(step).chunk(2)[mesh["rows"].get_local_rank()])
        loss.backward()
        parallel.reduce()
        optimizer.step()
        optimizer.zero_grad()
        both = loss.detach().clone()
        dist.all_reduce(both, group=mesh["rows"].get_group())
        losses.append(float(both) / 2)
    return losses, states(model)


def refused(how: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = Net()
    style: Any = ColwiseParallel()
    if how == "sequence":
        from torch.distributed.tensor import Shard

        style = ColwiseParallel(input_layouts=Shard(1))
    parallelize_module(net, mesh, {"blocks.0.up": style})
    config = LoraConfig(target_modules=["up"], use_dora=how == "dora")
    model = get_peft_model(net, config)
    factor = model.get_base_model().blocks[0].up.lora_B["default"]
    try:
        TensorParallel(model)
    except UnsupportedError as error:
        assert not isinstance(factor.weight, DTensor)
        return str(error)
    return ""


def dropped(folder: str) -> tuple[str, float, float]:
    """What rows with dropout are told; losses with it, which ranks must agree on, and without."""
    model = adapted(parted_base(folder), "a", lora_dropout=0.5)
    parallel = TensorParallel(model)
    model.train()
    torch.manual_seed(5)
    with_dropout = loss_of(model, batch(0))
    with_dropout.backward()
    parallel.reduce()
    model.eval()
    without = loss_of(model, batch(0))
    model.train()
    try:
        loss_of(model, batch(0), adapter_names=["a", "a", "__base__", "a"])
    except UnsupportedError as error:
        return str(error), float(with_dropout.detach()), float(without.detach())
    return "", 0.0, 0.0


def whole_alone(folder: str, names: tuple[str, ...], plan: list[Any], options: Any) -> Result:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(0)
    model = adapted(base, *names, **options)
    losses = train(model, model, plan, lambda rows: rows, lambda: None)
    return losses, states(model)
