"""Pipeline stages: each rank runs some blocks of a model, and has the adapters of their sites.

    keep_stage(model, index, count)     what is elsewhere leaves the model, and its adapters with it
    save_stages(model, folder)          every stage's tensors, gathered into one adapter's files
    load_stages(model, folder, name)    of an adapter's files, what belongs to this stage

Paths stay what they are in the whole model, so that files are those of the whole model as well.
What moves activations between the ranks is `torch.distributed.pipelining`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.config import PeftConfig
from multigraft.distributed.fsdp import blocks_of
from multigraft.errors import CheckpointError, ConfigError, StateError, listed
from multigraft.keys import full_key
from multigraft.layer import AdaptedLayer
from multigraft.roster import Roster
from multigraft.saving import files_of
from multigraft.state import roster_of_model, write
from multigraft.tuner import base_of
from multigraft.whole import full_shape

Pathlike = str | os.PathLike[str]


class Elsewhere(nn.Module):
    """Stands for a module that another stage has: what it is given it passes on.

    Args:
        module: what it stands for; forgotten but for parameters that others share with it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.shared = dict(module.named_parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return args[0] if args else next(iter(kwargs.values()))


def keep_stage(
    model: nn.Module, index: int, count: int, blocks: Sequence[nn.Module] | None = None
) -> list[str]:
    """Leave one stage's modules in a model, in place.

    The blocks are dealt out in equal runs. What comes before them (embeddings) is the first
    stage's, what comes after them (the last norm, the head) the last one's; what has no parameters
    stays everywhere.

    Args:
        model: a base model, which may be on the meta device, or a `PeftModel`.
        index: which stage, from 0.
        count: how many there are.
        blocks: by default the model's repeated blocks, see `multigraft.distributed.blocks_of`.

    Returns:
        Paths of what is elsewhere.

    Raises:
        ConfigError: there is no such stage, or there are fewer blocks than stages.
        StateError: adapters are merged.
    """
    base = base_of(model)
    roster = Roster.of(base)
    blocks = list(blocks_of(base) if blocks is None else blocks)
    if not 0 <= index < count:
        raise ConfigError(f"`index` (={index}) must be from 0 to {count - 1} for {count} stages.")
    if len(blocks) < count:
        raise ConfigError(
            f"{type(base).__name__} has {len(blocks)} blocks, too few for `count` (={count}) "
            "stages. Use fewer, or name its blocks with blocks=."
        )
    if roster.merged:
        raise StateError(f"adapters {roster.merged} are merged. Call unmerge_adapter() first.")
    first, last = len(blocks) * index // count, len(blocks) * (index + 1) // count
    kept = {id(block) for block in blocks[first:last]}
    leaving = _leaving(base, blocks, kept, index == 0, index == count - 1)
    stand_ins = []
    for _, parent, name in leaving:
        # torch types a child as perhaps None; blocks are there.
        stand_in = parent._modules[name] = Elsewhere(parent._modules[name])  # type: ignore[arg-type]
        stand_ins.append(stand_in)
    left = {id(parameter) for parameter in base.parameters()}
    for stand_in in stand_ins:
        stand_in.shared = {n: p for n, p in stand_in.shared.items() if id(p) in left}
    _forget(roster)
    return [path for path, _, _ in leaving]


def save_stages(
    model: nn.Module,
    folder: Pathlike,
    adapters: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save adapters whole, as `PeftModel.save_pretrained` does; all stages call.

    Args:
        adapters: names; all by default.
        group: the ranks of one pipeline; the default group by default. Its first one writes.

    Raises:
        CheckpointError: two stages have the same tensor, or the disk refuses.
    """
    roster, _ = roster_of_model(model)
    names = roster.require(roster.names() if adapters is None else adapters)
    root, files = Path(folder), {}
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for name in names:
        config, state = files_of(roster, name, roster.root)
        own = {key: tensor.detach().cpu() for key, tensor in state.items()}
        parts: list[Any] | None = [None] * size if rank == 0 else None
        to = 0 if group is None else dist.get_global_rank(group, 0)
        dist.gather_object((_targets(config), own), parts, dst=to, group=group)
        if parts is not None:
            place = root if name == "default" else root / name
            files[place] = _joined(config, parts, name)
    if files:
        checkpoint.save(root, files)
    dist.barrier(group=group)


def load_stages(model: nn.Module, folder: Pathlike, adapter: str = "default") -> None:
    """Give an adapter that the model has its values from a whole adapter's files.

    Raises:
        AdapterNameError: there is no such adapter.
        CheckpointError: the files lack some of this stage's tensors, or have others for it.
    """
    roster, _ = roster_of_model(model)
    roster.require_one(adapter)
    root = Path(folder)
    inside = root / adapter
    tensors = checkpoint.read(checkpoint.locate_weights(inside if inside.is_dir() else root))
    state = checkpoint.adapter_state(roster, adapter)
    expected = {key: full_shape(tensor) for key, tensor in state.items()}
    absent = _absent(roster.root)
    own = {k: v for k, v in tensors.items() if k in expected or not k.startswith(absent)}
    report, good = checkpoint.compare(expected, own)
    report.check(f"{folder} for stage's adapter `{adapter}`")
    write(roster, adapter, good)


def _leaving(
    base: nn.Module, blocks: Sequence[nn.Module], kept: set[int], is_first: bool, is_last: bool
) -> list[tuple[str, nn.Module, str]]:
    """Path, parent and name there of what another stage has."""
    inside = {id(block) for block in blocks}
    found: list[tuple[str, nn.Module, str]] = []
    is_after = False

    def holds(module: nn.Module) -> bool:
        return any(id(m) in inside for m in module.modules())

    def visit(parent: nn.Module, prefix: str) -> None:
        nonlocal is_after
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            path = f"{prefix}{name}"
            if id(child) in inside:
                is_after = True
                stays = id(child) in kept
            elif holds(child):
                visit(child, f"{path}.")
                continue
            else:
                has_some = next(child.parameters(), None) is not None
                stays = not has_some or (is_last if is_after else is_first)
            if not stays:
                found.append((path, parent, name))

    visit(base, "")
    return found


def _forget(roster: Roster) -> None:
    """Let the roster know only what is left in the model."""
    here = {id(m) for m in roster.root.modules() if isinstance(m, AdaptedLayer)}
    for name, layers in roster.layers.items():
        roster.layers[name] = [layer for layer in layers if id(layer) in here]
    roster.batchable.clear()
    for siblings in roster.siblings.values():
        for layer in list(siblings.members.values()):
            if id(layer) not in here:
                siblings.leave(layer)
    left = {id(p) for p in roster.root.parameters()}
    roster.thawed = [p for p in roster.thawed if id(p) in left]


def _absent(base: nn.Module) -> tuple[str, ...]:
    return tuple(f"{path}." for path, m in base.named_modules() if isinstance(m, Elsewhere))


def _targets(config: PeftConfig) -> Any:
    return getattr(config, "target_modules", None)


def _joined(
    config: PeftConfig, parts: Sequence[tuple[Any, dict[str, Tensor]]], adapter: str
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """One adapter's config and tensors, of those that the stages have."""
    whole: dict[str, Tensor] = {}
    for _, own in parts:
        twice = sorted(k for k in own.keys() & whole.keys() if not torch.equal(own[k], whole[k]))
        if twice:
            raise CheckpointError(
                f"adapter `{adapter}`: two stages have {listed([full_key(k) for k in twice])}, "
                "with other values. Each block must be in one stage: call keep_stage() on every "
                "rank."
            )
        whole |= own
    named = [targets for targets, _ in parts if isinstance(targets, (list, set, tuple))]
    if len(named) == len(parts):  # each stage may have resolved its own
        # Configs with targets alone come here.
        config.target_modules = sorted({t for targets in named for t in targets})  # type: ignore[attr-defined]
    return config, whole
