"""What is asked of a base model: its config, and, where its weights are at hand, single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multigraft.checkpoint import locate
from multigraft.errors import CheckpointError
from multigraft.reading import read_config, read_header, read_tensors, shown

CONFIG = "config.json"


def base_config(source: str) -> dict[str, Any]:
    """A base model's ``config.json``, from a directory or the hub; of several models, the text's.

    Raises:
        CheckpointError: there is none.
    """
    values = read_config(locate(source, CONFIG))
    inner = values.get("text_config")
    return {**values, **inner} if isinstance(inner, dict) else values


def named_base(values: Mapping[str, Any], given: str | None) -> str | None:
    """The base that the user named, or else the adapter's config does."""
    name = given or values.get("base_model_name_or_path")
    return str(name) if name else None


def copies_of_base(rest: Mapping[str, Tensor], base: str | None) -> list[str]:
    """Names of tensors that are the base's own, bit for bit, and can be left out.

    Raises:
        CheckpointError: the base's files are damaged.
    """
    folder = Path(base).expanduser() if base else None
    if folder is None or not folder.is_dir():
        return []
    files = {
        name: path
        for path in sorted(folder.glob("*.safetensors"))
        for name in read_header(path).tensors
    }
    read: dict[Path, dict[str, Tensor]] = {}
    same = []
    for name, tensor in rest.items():
        own = name.replace("base_layer.", "")
        path = files.get(own)
        if path is None:
            continue
        if path not in read:
            read[path] = read_tensors(path)
        held = read[path]
        if tensor.shape == held[own].shape and torch.equal(tensor, held[own].to(tensor.dtype)):
            same.append(name)
    return same


def check_on_base(paths: Mapping[str, tuple[int, int]], base: str, where: str) -> None:
    """Fail unless the base has a module of these sizes, (in, out), at each path.

    Raises:
        CheckpointError: it has not: a program that looks for the path would pass over the pair.
    """
    from multigraft.train import load_skeleton

    skeleton = dict(load_skeleton(base).named_modules())
    for path, (in_, out) in paths.items():
        weight = getattr(skeleton.get(path), "weight", None)
        if weight is None:
            raise CheckpointError(
                f"{where}: {base} has no layer {shown(path)}, so the pair there would be passed "
                "over. Name the base that the adapter was trained on."
            )
        if {in_, out} != set(weight.shape[:2]):
            raise CheckpointError(
                f"{where}: {shown(path)} has {in_} inputs and {out} outputs, and {base} has "
                f"{tuple(weight.shape)} there. Name the base that the adapter was trained on."
            )
