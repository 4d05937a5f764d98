"""Base and adapters into a model of their own, on disk, with one layer in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multigraft.errors import CheckpointError, ConfigError, MergeError, UnsupportedError
from multigraft.inspection import AdapterFiles, assemble
from multigraft.merging import companions
from multigraft.merging.base import MappedModel, held, local_folder, open_base
from multigraft.merging.check import Verdict, inputs_for, verdict
from multigraft.merging.layout import REMEDY
from multigraft.merging.output import Output
from multigraft.merging.staging import new_folder, require_free, require_space
from multigraft.merging.stream import OnLayer, Plan, plan, resized_values, run
from multigraft.model import PeftModel
from multigraft.train import load_tokenizer

CHECKS = ("logits", "off")
Pathlike = str | os.PathLike[str]


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        folder: of the new model.
        base: what it was merged into.
        adapters: their names.
        layers: at how many layers something was merged.
        tensors: how many tensors were to be changed.
        different: how many of them differ from the base's.
        bytes: of the new model's weights.
        untied: keys that were tied to others, and have values of their own now.
        verdict: what comparing outputs found; None when it was not asked for.
    """

    folder: str
    base: str
    adapters: list[str]
    layers: int
    tensors: int
    different: int
    bytes: int
    untied: list[str]
    verdict: Verdict | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = {**asdict(self), "is_checked": self.verdict is not None}
        found["verdict"] = None if self.verdict is None else self.verdict.to_dict()
        return found


@dataclass(eq=False)
class _Opened:
    """The base and the adapters on it."""

    source: str = ""
    base: MappedModel | None = None

    def load(self, source: str) -> nn.Module:
        self.source = source
        self.base = open_base(local_folder(source))
        # A plain module to the type checker: transformers is seen as Any.
        self.base.model.name_or_path = source  # type: ignore[assignment]
        return self.base.model

    def prepare(self, model: nn.Module, named: Mapping[str, AdapterFiles]) -> None:
        assert self.base is not None, "the base was loaded before"
        for name, files in named.items():
            _refuse_heads(model, name, files)
        self.base.fit(named.values())


def merge_files(
    adapters: Sequence[Pathlike],
    output: Pathlike,
    *,
    base: Pathlike | None = None,
    check: str = "logits",
    prompts: Sequence[str] = (),
    overwrite: bool = False,
    allow_pickle: bool = False,
    on_layer: OnLayer | None = None,
) -> Merged:
    """Merge adapters into their base and write the new model, layer by layer.

    In memory are the adapters and one layer at a time; the base's files are mapped. The new files
    have the base's names, shards, dtypes and order. They get their place in one rename when all is
    written and checked; whatever fails or is killed before leaves nothing there.

    Args:
        adapters: directories, or ids on the hub; all of them act together.
        base: the base model; by default the one that the adapters name.
        check: ``"logits"`` compares the outputs of both before anything is in place; ``"off"``
            does not.
        prompts: what to compare them on; random tokens by default.
        overwrite: replace a folder that is there.
        on_layer: is told of the progress.

    Raises:
        CheckpointError: files are damaged, do not fit, or the disk has no room.
        UnsupportedError: the base is quantised, or an adapter has no merged form.
        MergeError: what comes out is not finite, or not what the adapters say.
        StateError: there is something of the output's name.
    """
    if check not in CHECKS:
        raise ConfigError(f"`check` (={check!r}) must be one of {', '.join(CHECKS)}.")
    target = Path(output).expanduser()
    require_free(target, overwrite=overwrite)
    opened = _Opened()
    handle = assemble(
        list(adapters),
        opened.load,
        base=base,
        allow_pickle=allow_pickle,
        prepare=opened.prepare,
    )
    if not isinstance(handle, PeftModel) or opened.base is None:
        raise CheckpointError("no adapter was named, so there is nothing to merge.")
    handle.eval()
    names = list(handle.peft_config)
    handle.roster.set_active([])
    _refuse_begun(opened.base, handle)
    made = plan(opened.base, handle.roster, names)
    files = companions.companions(opened.base.folder, _folders(adapters))
    inputs = [] if check == "off" else inputs_for(opened.base.model, _tokens(opened, prompts))
    with new_folder(target, overwrite=overwrite) as stage:
        size, different = _write(opened.base, handle, names, made, stage, files, on_layer)
        companions.write_card(stage, opened.source, [str(adapter) for adapter in adapters])
        merged = open_base(stage)
        found = None
        if check != "off":
            kind = _narrowest(made)
            found = verdict(opened.base, handle, names, merged, inputs, kind)
            found.require()
    return Merged(
        folder=str(target),
        base=opened.source,
        adapters=names,
        layers=sum(len(layers) for layers, _ in made.groups),
        tensors=sum(len(changes) for _, changes in made.groups),
        different=different,
        bytes=size,
        untied=sorted(made.added),
        verdict=found,
    )


def _refuse_heads(model: nn.Module, name: str, files: AdapterFiles) -> None:
    """Fail where an adapter brings a module that the base has not, such as a classifier's head."""
    paths = {path for path, _ in model.named_modules()}
    for saved in getattr(files.config, "modules_to_save", None) or ():
        brought = {key.rpartition(".")[0] for key in files.tensors if f".{saved}." in f".{key}"}
        new = sorted(path for path in brought if path not in paths)
        if new:
            task = f" (for {files.config.task_type})" if files.config.task_type else ""
            raise UnsupportedError(
                f"`{name}` brings a module of its own, `{new[0]}`{task}, "
                f"which {type(model).__name__} has not, so its files are not the merged model's. "
                "Merge in memory: AutoPeftModelFor….from_pretrained(adapter).merge_and_unload(), "
                "and save that with save_pretrained()."
            )


def _refuse_begun(base: MappedModel, handle: PeftModel) -> None:
    """Fail where an adapter began with a part of weights that are made only when they are used."""
    for layer in handle.roster.touched(handle.peft_config):
        for graft in layer.all_grafts():
            name = f"{graft.site.path}.{graft.site.tensor_name}"
            start = getattr(graft.method, "start", None)
            if name in base.built and getattr(start, "takes_out", False):
                raise UnsupportedError(
                    f"{name}: `{graft.adapter}` began with a part of it, and it is stored as "
                    f"{len(base.built[name].keys)} tensors. {REMEDY}"
                )


def _write(
    base: MappedModel,
    handle: PeftModel,
    names: Sequence[str],
    made: Plan,
    stage: Path,
    files: dict[str, Path],
    on_layer: OnLayer | None,
) -> tuple[int, int]:
    """Fill the folder; bytes of the weights, and how many tensors differ from the base's."""
    sizes = {base.names[path]: tuple(held(*base.places[path]).shape) for path in base.resized}
    output, resized = Output(stage, base.weights, made.added, sizes), resized_values(base, made)
    require_space(stage, output.size + sum(path.stat().st_size for path in files.values()))
    output.begin([*made.keys, *resized])
    different = run(base, handle.roster, names, made, output, on_layer)
    for key, value in resized.items():
        output.put(key, value)
    output.end()
    companions.copy(files, stage)
    if sizes:
        companions.resize(stage, next(iter(sizes.values()))[0])
    if made.added:
        companions.untie(stage)
    if not different:
        raise MergeError(
            f"merging {names} would change none of the base's {len(made.keys)} tensors: the "
            "adapters are untrained, or too small for the dtype of the base's weights. Nothing was "
            "kept. `multigraft report` shows how strong an adapter is."
        )
    return output.size, different


def _folders(adapters: Sequence[Pathlike]) -> list[Path]:
    folders = [Path(adapter).expanduser() for adapter in adapters]
    return [folder for folder in folders if folder.is_dir()]


def _tokens(opened: _Opened, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts or opened.base is None:
        return []
    tokenizer = load_tokenizer(opened.base.folder)
    return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]


def _narrowest(made: Plan) -> torch.dtype:
    """The coarsest dtype of what was merged, which decides how much rounding there is."""
    kinds = {change.value().dtype for _, changes in made.groups for change in changes}
    floats = [kind for kind in kinds if kind.is_floating_point]
    return max(floats, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)
