"""Files of kohya's scripts, which A1111 and ComfyUI read: paths with underscores for dots.

    lora_unet_<path>.lora_down.weight, .lora_up.weight, .alpha     scale: alpha / rank

What a path was is not in its name, since names of modules have underscores as well. It is taken
from the file's metadata where we wrote it, else pieced together from words that are known; a path
that can be read in two ways, or in none, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from multigraft.errors import CheckpointError, UnsupportedError
from multigraft.exchange.contract import FORMATS, Files, Format, Loras, Options
from multigraft.exchange.formats.diffusers import fill, number
from multigraft.exchange.parts import named_parts
from multigraft.exchange.paths import dotted
from multigraft.exchange.plain import checked
from multigraft.reading import PICKLE_ENDINGS, read_header, read_tensors, shown

NAME = re.compile(
    r"(?P<head>lora_(?P<model>unet|transformer|te[123]?|prior)_(?P<path>\w+))\."
    r"(?P<leaf>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
SLOTS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}
MODELS = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
NOTE = "multigraft.paths"
"""Flat names to paths, as JSON."""


class Kohya(Format):
    """kohya's files."""

    name = "kohya"

    def recognises(self, source: Path, names: Collection[str]) -> bool:
        return any(NAME.fullmatch(name) for name in names)

    def read(self, source: Path, options: Options) -> Loras:
        tensors = read_tensors(source, allow_pickle=options.allow_pickle)
        is_pickle = source.suffix in PICKLE_ENDINGS
        paths = {} if is_pickle else _noted(read_header(source).metadata)
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = NAME.fullmatch(name)
            if match is None:
                raise UnsupportedError(
                    f"{source}: {shown(name)} is no low-rank pair's (LoHa, LoKr, LoCon's middle "
                    "and full differences are none) and would be dropped. Load the file in "
                    "diffusers, or merge it there."
                )
            part = MODELS.get(match["model"], match["model"])
            path = paths.get(match["head"]) or dotted(match["path"], str(source))
            slots = found.setdefault((part, path), {})
            slot = SLOTS[match["leaf"]]
            if slot in slots:
                raise CheckpointError(f"{source}: two tensors are {slot} at {shown(path)}.")
            slots[slot] = _by_output(tensor, name, source) if slot == "magnitude" else tensor
        loras = Loras({})
        for (part, path), slots in found.items():
            alpha = number(slots.pop("alpha", None), str(source), path)
            pair = checked(str(source), path, slots, alpha)
            loras.parts.setdefault(part, {})[path] = pair
        return loras

    def write(self, loras: Loras, target: Path, options: Options) -> Files:
        parts = named_parts(loras, options)
        tensors: dict[str, Tensor] = {}
        paths: dict[str, str] = {}
        for part, pairs in parts.items():
            head = _head(part, parts)
            for path, pair in pairs.items():
                flat = f"lora_{head}_{path.replace('.', '_')}"
                if flat in paths or pair.is_lookup:
                    why = "an embedding" if pair.is_lookup else f"{shown(paths[flat])} as well"
                    raise UnsupportedError(
                        f"{target}: {shown(path)} cannot be named in kohya's way: `{flat[:80]}` is "
                        f"{why}."
                    )
                paths[flat] = path
                tensors[f"{flat}.lora_down.weight"] = pair.A.contiguous()
                tensors[f"{flat}.lora_up.weight"] = pair.B.contiguous()
                tensors[f"{flat}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
                if pair.magnitude is not None:
                    shape = (-1, *[1] * (pair.B.ndim - 1))
                    tensors[f"{flat}.dora_scale"] = pair.magnitude.reshape(shape).contiguous()
        metadata = {"format": "pt", NOTE: json.dumps(paths)}
        return {target: partial(fill, tensors, metadata)}


def _head(part: str, parts: Collection[str]) -> str:
    if part == "text_encoder":
        return "te1" if any(p.startswith("text_encoder_") for p in parts) else "te"
    short = {long: short for short, long in MODELS.items()}
    head = short.get(part, part)
    if not re.fullmatch(r"unet|transformer|te[123]?|prior", head):
        raise UnsupportedError(f"kohya's files have no name for the model {shown(part)}.")
    return head


def _noted(metadata: Mapping[str, str]) -> dict[str, str]:
    """Paths that the file notes, those alone that are what their flat name says."""
    try:
        noted = json.loads(metadata.get(NOTE, "{}"))
    except (ValueError, RecursionError):
        return {}
    found = {}
    for flat, path in noted.items() if isinstance(noted, dict) else ():
        if isinstance(path, str) and re.fullmatch(r"[\w.]+", path):
            match = re.fullmatch(r"lora_(unet|transformer|te[123]?|prior)_(\w+)", flat)
            if match and match[2] == path.replace(".", "_"):
                found[flat] = path
    return found


def _by_output(tensor: Tensor, name: str, source: Path) -> Tensor:
    """DoRA's magnitude as PEFT has it, one number an output."""
    if tensor.ndim < 2 or tensor.numel() != tensor.shape[0]:
        raise UnsupportedError(
            f"{source}: {shown(name)} has the shape {tuple(tensor.shape)}: its magnitudes go by "
            "inputs, which PEFT's DoRA has not. Merge the file where it was made."
        )
    return tensor.reshape(-1)


FORMATS.register(Kohya.name, Kohya())
