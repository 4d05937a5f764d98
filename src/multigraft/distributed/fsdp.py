"""FSDP2: every rank holds a part of the frozen base, and whole adapters beside it.

    base        sharded block by block: gathered for a block's forward and backward, then dropped
    adapters    whole on every rank, outside FSDP: one all-reduce of their gradients a step

Why not shard the adapters with their blocks: PyTorch shards a tensor over its first axis, and A has
``rank`` rows, so that beyond ``rank`` processes it is padding that is sent; every adapter that is
there would be gathered for every block, active or not; and each block would wait for a
reduce-scatter of its own. ``docs/distributed.md`` has the counts. ``adapters="sharded"`` does it
all the same, for adapters whose optimiser state is too large for one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from multigraft.distributed.replicas import Replicas, owned_tensors
from multigraft.errors import ConfigError, StateError, UnsupportedError
from multigraft.layer import AdaptedLayer
from multigraft.roster import Roster
from multigraft.tuner import base_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Adapters = Literal["replicated", "sharded"]


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    adapters: Adapters = "replicated",
    blocks: Iterable[nn.Module] | None = None,
    reshard_after_forward: bool = True,
    **options: Any,
) -> Replicas | None:
    """Shard a base model in place, with or before its adapters.

    Adapters that are attached later are whole on every rank as well. The base's dtype is its own
    matter: each tensor keeps the one that it has.

    Args:
        model: a base model, which may be on the meta device, or a `PeftModel`.
        mesh: of one dimension, or two with names to replicate over the first and shard over the
            second; by default all ranks.
        adapters: ``"replicated"``, or ``"sharded"`` with their blocks.
        blocks: what is gathered together; by default the model's repeated blocks, see `blocks_of`.
        reshard_after_forward: False keeps blocks whole until their backward: more memory, half the
            traffic.
        options: of `torch.distributed.fsdp.fully_shard`: ``mp_policy``, ``offload_policy``.

    Returns:
        What reduces the adapters' gradients; None while there are none.

    Raises:
        ConfigError: ``adapters`` is neither of the two, or the mesh's dimensions have no names.
        StateError: an adapter is merged, so the base's own tensors are not in the model.
        UnsupportedError: PyTorch is older than FSDP2's public form (2.6).
    """
    if adapters not in ("replicated", "sharded"):
        raise ConfigError(f'`adapters` (={adapters!r}) must be "replicated" or "sharded".')
    fully_shard = _fully_shard()
    base = base_of(model)
    roster = Roster.of(base)
    if roster.merged:
        raise StateError(
            f"adapters {roster.merged} are merged into the base. Call unmerge_adapter() before "
            "sharding it."
        )
    mesh = mesh if mesh is not None else _all_ranks()
    if mesh.ndim > 1 and mesh.mesh_dim_names is None:
        raise ConfigError(
            f"`mesh` has {mesh.ndim} dimensions without names. Give it mesh_dim_names=, such as "
            '("replicate", "shard").'
        )
    options = {"mesh": mesh, "reshard_after_forward": reshard_after_forward, **options}
    if adapters == "replicated":
        own = {p for p in owned_tensors(roster) if isinstance(p, nn.Parameter)}
        options["ignored_params"] = own
    else:
        if roster.configs:
            Replicas(model)  # rank 0's values, of which each rank keeps a part
        options["shard_placement_fn"] = _placement(roster, mesh)
    for block in blocks_of(base) if blocks is None else blocks:
        fully_shard(block, **options)
    fully_shard(base, **options)
    return Replicas(model, _group(mesh)) if roster.configs else None


def blocks_of(base: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks.

    What transformers says must stay in one place (``_no_split_modules``), or else the elements of
    the outermost lists of modules of one class.
    """
    named = set(getattr(base, "_no_split_modules", None) or ())
    found = _outermost(base, lambda m: _class_name(m) in named) if named else []
    if found:
        return found
    lists = _outermost(base, lambda m: isinstance(m, nn.ModuleList) and len(m) > 1)
    alike = (m for m in lists if len({type(child) for child in m.children()}) == 1)
    return [child for m in alike for child in m.children()]


def _outermost(root: nn.Module, is_one: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules below ``root`` that are such, and not inside another one that is."""
    found: dict[int, nn.Module] = {}
    for child in root.children():
        if isinstance(child, AdaptedLayer):
            continue
        if is_one(child):
            found[id(child)] = child
        else:
            found |= {id(m): m for m in _outermost(child, is_one)}
    return list(found.values())


def _class_name(module: nn.Module) -> str:
    """Of the class that it was written as, before anything was put in between."""
    return next(
        c.__name__ for c in type(module).__mro__ if not c.__module__.startswith("torch.distributed")
    )


def _placement(roster: Roster, mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """Over which axis an adapter's tensor is sharded: the longer one, where it divides.

    PyTorch pads the first axis and no other; A has few rows and many columns.
    """
    from torch.distributed.tensor import Shard

    own = {id(tensor) for tensor in owned_tensors(roster)}
    ranks = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Any:
        if id(parameter) not in own or parameter.dim() < 2:
            return None
        longest = max(range(parameter.dim()), key=lambda axis: parameter.shape[axis])
        return Shard(longest) if parameter.shape[longest] % ranks == 0 else None

    return place


def _fully_shard() -> Any:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UnsupportedError(
            f"FSDP2 needs PyTorch 2.6 or newer, and this is {torch.__version__}. Upgrade it, or "
            "train with Replicas."
        ) from error
    return fully_shard


def _all_ranks() -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = device.type if device is not None and _has_its_backend() else "cpu"
    return init_device_mesh(kind, (torch.distributed.get_world_size(),))


def _has_its_backend() -> bool:
    return "gloo" not in torch.distributed.get_backend()


def _group(mesh: DeviceMesh) -> Any:
    """All ranks of the mesh as one group: each has rows of its own."""
    if mesh.size() == torch.distributed.get_world_size():
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    return mesh._flatten("multigraft_rows").get_group()
