"""A sharded base straight from its files: no rank ever holds all of it.

The model is made on the meta device, sharded there, and each rank reads of each tensor the part
that it keeps, from files that are mapped and not read as a whole.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multigraft.base_state import names_of_base
from multigraft.distributed.fsdp import shard
from multigraft.distributed.stages import Elsewhere
from multigraft.errors import CheckpointError, MissingExtraError, StateError, listed
from multigraft.reading import check_inside, read_header
from multigraft.tuner import base_of
from multigraft.whole import is_parted

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_base(
    folder: str | os.PathLike[str],
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> nn.Module:
    """A causal language model of transformers, sharded by FSDP2; all ranks call.

    Args:
        folder: a directory with its config and safetensors files.
        mesh: see `multigraft.distributed.shard`.
        dtype: the checkpoint's own by default.
        device: where the parts go; the mesh's device by default.
        options: further ones of `multigraft.distributed.shard`.

    Raises:
        CheckpointError: files are missing, damaged, or of another model.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError(
            "loading a base model needs transformers: pip install 'multigraft[train]'"
        ) from error
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise CheckpointError(f"{root} holds no config.json. Give the base model's directory.")
    config = AutoConfig.from_pretrained(root)
    with torch.device("meta"):
        kind = {} if dtype is None and config.dtype is None else {"dtype": dtype or config.dtype}
        model: nn.Module = AutoModelForCausalLM.from_config(config, **kind)
    shard(model, mesh, **options)
    fill_base(model, root, device)
    return model.eval()


@torch.no_grad()
def fill_base(
    model: nn.Module, folder: str | os.PathLike[str], device: torch.device | str | None = None
) -> None:
    """Give a model on the meta device its values from safetensors files: each rank its own parts.

    Args:
        model: sharded or not, a base model or a `PeftModel`; adapters are not touched.
        device: where whole tensors go; parts go to their mesh's device.

    Raises:
        CheckpointError: files or tensors are missing, or of another shape; nothing was changed.
        StateError: a buffer that no file has could not be made.
    """
    base, root = base_of(model), Path(folder)
    own = dict(_slots(base))
    files = _files(root)
    _check(root, own, files)
    before = {name: id(_held(slot)) for name, slot in own.items()}
    for path in sorted(set(files.values())):
        _fill_from(path, {n: s for n, s in own.items() if files.get(n) == path}, device)
    made = {before[name]: _held(slot) for name, slot in own.items() if name in files}
    for name, slot in own.items():
        if name not in files:  # the checkpoint has once what several modules share
            _hold(slot, made[before[name]])
    _remake_buffers(base, device)


Slot = tuple[nn.Module, str]


def _slots(base: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Where the base's tensors are, by the names that they have without adapters.

    One that is shared with a module of another stage has that module's name as well.
    """
    found = {}
    for name, key in names_of_base(base).items():
        path, _, leaf = key.rpartition(".")
        slot = base.get_submodule(path), leaf
        found[id(_held(slot))] = slot
        yield name, slot
    for path, module in base.named_modules():
        for name, tensor in module.shared.items() if isinstance(module, Elsewhere) else ():
            yield f"{path}.{name}", found[id(tensor)]


def _held(slot: Slot) -> Tensor:
    owner, leaf = slot
    held = owner._parameters.get(leaf)
    found = held if held is not None else owner._buffers[leaf]
    assert found is not None, "it is in the state dict"
    return found


def _hold(slot: Slot, tensor: Tensor) -> None:
    owner, leaf = slot
    table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    table[leaf] = tensor


def _files(root: Path) -> dict[str, Path]:
    """Names of tensors to the files that hold them."""
    if (root / INDEX).is_file():
        try:
            table = json.loads((root / INDEX).read_text("utf-8"))["weight_map"]
            files = {str(name): root / str(file) for name, file in table.items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{root / INDEX} is no index of files ({error!r}).") from error
        for path in set(files.values()):
            check_inside(path, root)
        return files
    if not (root / SINGLE).is_file():
        raise CheckpointError(
            f"{root} holds neither {INDEX} nor {SINGLE}. Save the base with safetensors "
            "(save_pretrained), whose parts can be read by themselves."
        )
    return dict.fromkeys(read_header(root / SINGLE).tensors, root / SINGLE)


def _check(root: Path, own: Mapping[str, Slot], files: Mapping[str, Path]) -> None:
    """Fail before anything is changed."""
    headers = {path: read_header(path).tensors for path in set(files.values())}
    held = {id(_held(own[name])) for name in files if name in own}
    missing = [n for n, slot in own.items() if n not in files and id(_held(slot)) not in held]
    wrong = []
    if missing:
        wrong.append(f"it lacks {listed(missing)}")
    shapes = []
    for name, path in files.items():
        if name not in headers[path]:
            wrong.append(f"{path.name} lacks `{name}`, which the index says it has")
        elif name in own and headers[path][name].shape != tuple(_held(own[name]).shape):
            shapes.append(name)
    if shapes:
        wrong.append(f"of another shape are {listed(shapes)}")
    if wrong:
        raise CheckpointError(
            f"{root} does not fit the model: {'; '.join(wrong)}. Nothing was changed. Is it that "
            "model's checkpoint, under the names that its modules have? Where transformers "
            "converts names on loading, save it once with save_pretrained()."
        )


def _fill_from(path: Path, own: Mapping[str, Slot], device: Any) -> None:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, slot in own.items():
                held = _held(slot)
                value = _filled(held, file.get_slice(name), device)
                is_parameter = isinstance(held, nn.Parameter)
                _hold(slot, nn.Parameter(value, held.requires_grad) if is_parameter else value)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Copy it again.") from error


def _filled(held: Any, stored: Any, device: Any) -> Tensor:
    """A tensor like ``held``, with the values that are stored; its own part when it has parts."""
    if not is_parted(held):
        whole: Tensor = stored[:] if held.dim() else stored[...]
        place = device or (held.device if not held.is_meta else "cpu")
        return whole.to(device=place, dtype=held.dtype)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = held.device_mesh, held.placements
    shape, offset = compute_local_shape_and_global_offset(held.shape, mesh, placements)
    spans = tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))
    part = stored[spans] if all(shape) else torch.empty(shape)
    # A copy of its own: a view would keep the file mapped.
    part = part.to(device=mesh.device_type, dtype=held.dtype, copy=True).contiguous()
    joined: Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=held.shape, stride=held.stride()
    )
    return joined


def _remake_buffers(base: nn.Module, device: Any) -> None:
    """Values for what no file has: buffers such as the frequencies of rotary positions."""
    for path, module in list(base.named_modules()):
        lacking = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not lacking:
            continue
        fresh = _made_again(module)
        for name in lacking:
            value = fresh._buffers.get(name) if fresh is not None else None
            if value is None or value.is_meta:
                raise StateError(
                    f"{path}: the buffer `{name}` is in no file, and {type(module).__name__} "
                    "cannot be made again from its `config` alone. Make the model with that "
                    "module off the meta device."
                )
            module._buffers[name] = value.to(device or _place(base))


def _made_again(module: nn.Module) -> nn.Module | None:
    """Another module of the kind, with values, where its config is all that it is made from."""
    needs = [
        p.name
        for p in list(inspect.signature(type(module).__init__).parameters.values())[1:]
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if needs != ["config"] or not hasattr(module, "config"):
        return None
    with torch.device("cpu"):
        made: nn.Module = type(module)(config=module.config)
    return made


def _place(base: nn.Module) -> torch.device:
    """Where the base is."""
    first: Any = next(base.parameters())
    return first.to_local().device if hasattr(first, "to_local") else first.device
