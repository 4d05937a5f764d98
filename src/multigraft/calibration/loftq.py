"""LoftQ on a base that is quantised already; see `multigraft.initialisations.loftq`.

What quantising lost is known from the file of the weights as they were before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multigraft.errors import CheckpointError, StateError, TargetError
from multigraft.graft import Graft
from multigraft.initialisations import MATRICES
from multigraft.initialisations.loftq import largest
from multigraft.methods.lora import LoRA
from multigraft.model import PeftModel

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let an adapter on a quantised base begin at what quantising lost of each weight.

    Args:
        peft_model: a `PeftModel` whose base is quantised.
        model_path: the safetensors file of the weights before quantisation, or its folder (split
            files with an index as well); by default the local copy of the hub's model.
        adapter_name: the adapter, a plain LoRA.
        callback: called with the model and the layer's name after each layer; where it returns
            False, the layer's factors are set back. It may look whether outputs came nearer.

    Raises:
        StateError: the model has no such adapter, or it is merged.
        TargetError: none of its layers is quantised.
        CheckpointError: the file is not there, or has not the layers' weights.
    """
    if not isinstance(peft_model, PeftModel):
        raise StateError(
            f"replace_lora_weights_loftq: `peft_model` (={type(peft_model).__name__}) must be a "
            "PeftModel; call get_peft_model() on the quantised model first."
        )
    name = peft_model.roster.require_one(adapter_name)
    if name in peft_model.roster.merged:
        raise StateError(f"adapter `{name}` is merged; call unmerge_adapter() first.")
    grafts = [g for _, g in peft_model.roster.grafts(name) if _is_quantised(g)]
    if not grafts:
        raise TargetError(
            f"replace_lora_weights_loftq: no linear layer of adapter `{name}` is quantised. On a "
            'base that is not, make the adapter with init_lora_weights="loftq".'
        )
    files = _files(peft_model.get_base_model(), model_path)
    for graft in grafts:
        before = {key: graft.params[key].clone() for key in graft.method.geometry.factors}
        _write(graft, _error(graft, _weight(files, peft_model.get_base_model(), graft)))
        peft_model.roster.forget_stacks()
        if callback is not None and not callback(peft_model, graft.site.path):
            for key, value in before.items():
                graft.params[key].copy_(value)
            peft_model.roster.forget_stacks()


def _is_quantised(graft: Graft) -> bool:
    lora, site = graft.method, graft.site
    is_plain = isinstance(lora, LoRA) and lora.variant is None and not lora.start.takes_out
    is_matrix = site.geometry is not None and site.geometry.name in MATRICES
    return is_plain and is_matrix and not site.storage.is_exact


def _error(graft: Graft, W: Tensor) -> Tensor:
    """What quantising lost of ``W``, both in the weight's layout, as ``(out, in)``."""
    site = graft.site
    Q = site.weight()
    if W.shape != Q.shape:
        raise CheckpointError(
            f"{site.path}.weight is {tuple(W.shape)} in the file and {tuple(Q.shape)} here: it is "
            "another model's file."
        )
    lost = W.to(Q.device, torch.float32) - Q.float()
    return graft.method.geometry.as_matrix(site.layer, lost)


def _write(graft: Graft, lost: Tensor) -> None:
    """Set A and B so that ``scaling B A`` is the largest part of what was lost."""
    lora = cast(LoRA, graft.method)
    if lora.scaling <= 0:
        raise TargetError(
            f"{graft.site.path}: the scaling (={lora.scaling:g}) must be positive; choose a "
            "positive `lora_alpha`."
        )
    L, R = largest(lost, lora.rank)
    graft.params[lora.A].copy_(R / lora.scaling**0.5)
    graft.params[lora.B].copy_(L / lora.scaling**0.5)


def _files(base: nn.Module, model_path: str | os.PathLike[str] | None) -> Mapping[str, Path]:
    """Files by the names of the tensors in them."""
    path = _cached(base) if model_path is None else Path(model_path)
    is_file = path.suffix == ".safetensors"
    folder, file = (path.parent, path) if is_file else (path, path / FILE)
    if file.is_file():
        with _opened(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)
    if (folder / INDEX).is_file():
        table = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / name for key, name in table.items()}
    raise CheckpointError(
        f"`model_path` (={str(path)!r}) holds neither {FILE} nor {INDEX}. Give the folder or the "
        "safetensors file of the model before quantisation."
    )


def _cached(base: nn.Module) -> Path:
    """The local copy of the hub's model."""
    name = getattr(base, "name_or_path", None)
    if name and Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), local_files_only=True))
    except Exception as error:  # whatever the hub's client says, the remedy is the same
        raise CheckpointError(
            f"the model (`name_or_path`={name!r}) has no local copy ({error}). Give `model_path`: "
            "the folder or safetensors file of the model before quantisation."
        ) from error


def _weight(files: Mapping[str, Path], base: nn.Module, graft: Graft) -> Tensor:
    """The layer's weight before quantisation, in its layout."""
    key = f"{graft.site.path}.{graft.site.tensor_name}"
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    # A file may hold the model without its head, or this model be without it.
    names = (key, key.removeprefix(prefix), prefix + key)
    found = next((name for name in names if name in files), None)
    if found is None:
        raise CheckpointError(
            f"`model_path` holds no `{key}`. Give the file of this model before quantisation."
        )
    with _opened(files[found]) as tensors:
        return cast(Tensor, tensors.get_tensor(found))


def _opened(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}).") from error
