"""What each rank does in the tests of DeepSpeed's ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft import (
    CheckpointError,
    LoraConfig,
    MultigraftError,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from tests.distributed import fake_deepspeed as fake
from tests.distributed.plain import Net, ids_of, plain, plain_loss
from tests.distributed.replica_jobs import rank, states


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), fake.step(model):
        return model(ids_of(0)).clone()


def lifecycle(folder: str) -> dict[str, Any]:
    """Outputs and files of a partitioned model, from training to merging."""
    found: dict[str, Any] = {}
    with fake.installed():
        model = plain("default", "b")
        fake.partition(model)
        assert all(p.numel() == 0 for p in model.parameters())
        found["logits"] = logits(model)
        with fake.step(model):
            plain_loss(model, ids_of(0)).backward()
        found["gradients"] = [p.grad for p in model.parameters() if p.grad is not None]
        found["states"] = states(model)
        model.save_pretrained(folder, is_main_process=rank() == 0)
        torch.distributed.barrier()
        found["files"] = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*.saf*"))
        bare = [p.ds_tensor.clone() for p in model.parameters()]  # type: ignore[attr-defined]
        model.merge_adapter()
        found["moved"] = sum(
            not torch.equal(a, p.ds_tensor)  # type: ignore[attr-defined]
            for a, p in zip(bare, model.parameters(), strict=True)
        )
        found["merged"] = logits(model)
        model.unmerge_adapter()
        found["is_restored"] = all(
            torch.equal(a, p.ds_tensor)  # type: ignore[attr-defined]
            for a, p in zip(bare, model.parameters(), strict=True)
        )
        doubled = {k: 2 * v for k, v in found["states"].items() if k.startswith("default/")}
        doubled = {k.removeprefix("default/"): v for k, v in doubled.items()}
        set_peft_model_state_dict(model, doubled)
        found["doubled"] = states(model)
        model.load_adapter(folder, "default")
        found["loaded"] = states(model)
        found["empty"] = all(p.numel() == 0 for p in model.parameters())
    return found


def attached_late() -> tuple[Tensor, Tensor, str]:
    """PiSSA on a base that is partitioned already; and what a saved module is told."""
    with fake.installed():
        torch.manual_seed(0)
        net = Net()
        fake.partition(net)
        config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights="pissa")
        model = get_peft_model(net, config)
        fake.partition(model)
        message = ""
        try:
            model.add_adapter("c", LoraConfig(target_modules=["up"], modules_to_save=["head"]))
        except MultigraftError as error:
            message = str(error)
        return (
            logits(model),
            states(model)["default/base_model.model.blocks.0.up.lora_A.weight"],
            (message),
        )


def without(folder: str, is_ancient: bool) -> tuple[str, list[str]]:
    """What saving says where DeepSpeed is gone or ancient, and the files that there are."""
    model = plain("default")
    fake.partition(model)
    place = Path(folder) / f"rank-{rank()}"
    message = ""
    try:
        if is_ancient:
            with fake.installed(is_ancient=True):
                model.save_pretrained(place)
        else:
            model.save_pretrained(place)
    except CheckpointError as error:
        message = str(error)
    return message, [p.name for p in place.rglob("*")] if place.exists() else []


def alone() -> tuple[PeftModel, Tensor, list[Tensor], Tensor]:
    model = plain("default", "b")
    with torch.no_grad():
        own = model(ids_of(0))
        model.merge_adapter()
        merged = model(ids_of(0))
        model.unmerge_adapter()
    plain_loss(model, ids_of(0)).backward()
    return model, own, [p.grad for p in model.parameters() if p.grad is not None], merged
