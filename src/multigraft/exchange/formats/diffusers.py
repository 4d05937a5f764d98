"""diffusers' single file: tensors of several models, each name below its model's.

    unet.<path>.lora_A.weight          its own names, and PEFT's
    unet.<path>.lora.down.weight       before PEFT; also `.processor.to_q_lora.down.weight`, and
                                       `lora_linear_layer.down.weight` in text encoders

Ranks are the tensors'. Scales stand in the header's ``lora_adapter_metadata``, the fields of a PEFT
config below each model's name, or in ``<path>.alpha``; without either, they are 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from multigraft.config import PeftConfig
from multigraft.errors import CheckpointError, ConfigError, UnsupportedError
from multigraft.exchange.contract import FORMATS, Files, Format, Loras, Options, Pair
from multigraft.exchange.formats.peft import FOLLOWED, LEAVES, MAGNITUDE, config_of
from multigraft.exchange.parts import named_parts
from multigraft.exchange.plain import checked, pairs_of
from multigraft.reading import PICKLE_ENDINGS, read_header, read_tensors, shown

PARTS = r"(unet|transformer(?:_2)?|text_encoder(?:_[234])?|prior)"
NOTE = "lora_adapter_metadata"
SAID = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora")
NAME = re.compile(
    PARTS + r"\.(?P<path>.+?)\.(?:(?P<old>lora|lora_linear_layer)\.(?P<way>down|up)\.weight"
    r"|(?P<factor>lora_[AB])\.weight|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<alpha>alpha))"
)
PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


class Diffusers(Format):
    """diffusers' files, old names included."""

    name = "diffusers"

    def recognises(self, source: Path, names: Collection[str]) -> bool:
        return any(NAME.fullmatch(_modern(name)) for name in names)

    def read(self, source: Path, options: Options) -> Loras:
        tensors = read_tensors(source, allow_pickle=options.allow_pickle)
        is_pickle = source.suffix in PICKLE_ENDINGS
        said = {} if is_pickle else _noted(read_header(source).metadata, source)
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            match = NAME.fullmatch(_modern(name))
            if match is None:
                raise UnsupportedError(
                    f"{source}: {shown(name)} is no low-rank pair's and would be dropped."
                )
            slots = found.setdefault(match[1], {}).setdefault(match["path"], {})
            slot = _slot(match)
            if slot in slots:
                raise CheckpointError(f"{source}: two tensors are {slot} at {shown(name)}.")
            slots[slot] = tensor
        loras = Loras({})
        for part, sites in found.items():
            own = _below(said, part)
            loras.parts[part] = _pairs(sites, own, f"{source}: {part}")
            loras.values[part] = {k: v for k, v in own.items() if k not in FOLLOWED}
        return loras

    def write(self, loras: Loras, target: Path, options: Options) -> Files:
        tensors: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        for part, pairs in named_parts(loras, options).items():
            for site, pair in pairs.items():
                if pair.is_lookup:
                    raise UnsupportedError(
                        f"{target}: {shown(site)} is an embedding, which diffusers does not adapt."
                    )
                tensors[f"{part}.{site}.{LEAVES[0]}"] = pair.A.contiguous()
                tensors[f"{part}.{site}.{LEAVES[1]}"] = pair.B.contiguous()
                if pair.magnitude is not None:
                    tensors[f"{part}.{site}.{MAGNITUDE}"] = pair.magnitude.contiguous()
            config = config_of(pairs, {"target_modules": sorted(pairs)}).to_dict()
            said |= {f"{part}.{key}": config[key] for key in SAID}
        metadata = {"format": "pt", NOTE: json.dumps(said, indent=2, sort_keys=True)}
        return {target: partial(fill, tensors, metadata)}


def fill(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a safetensors file with metadata, in place; tensors that share memory are copied."""
    memories: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    save_file(own, path, dict(metadata))


def _modern(name: str) -> str:
    """An attention processor's name as its layer's."""
    match = PROCESSOR.fullmatch(name)
    if match is None:
        return name
    inner = "to_out.0" if match[2] == "to_out" else match[2]
    return f"{match[1]}.{inner}.lora.{match[3]}.weight"


def _slot(match: re.Match[str]) -> str:
    if match["way"]:
        return {"down": "A", "up": "B"}[match["way"]]
    if match["factor"]:
        return match["factor"][-1]
    return "magnitude" if match["magnitude"] else "alpha"


def _noted(metadata: Mapping[str, str], source: Path) -> dict[str, Any]:
    text = metadata.get(NOTE)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: its `{NOTE}` is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: its `{NOTE}` must be a JSON object.")
    return values


def _below(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    begin = f"{part}."
    return {k.removeprefix(begin): v for k, v in values.items() if k.startswith(begin)}


def _pairs(
    sites: Mapping[str, dict[str, Tensor]], said: Mapping[str, Any], where: str
) -> dict[str, Pair]:
    """Pairs with the scales that the metadata or the alphas say; else of scale 1."""
    has_alphas = any("alpha" in slots for slots in sites.values())
    if said and not has_alphas:
        config = PeftConfig.from_dict({**said, "peft_type": "LORA"})
        names = {"A": LEAVES[0], "B": LEAVES[1], "magnitude": MAGNITUDE}
        tensors = {f"{p}.{names[s]}": t for p, slots in sites.items() for s, t in slots.items()}
        return pairs_of(config, tensors, where, keeps_dora=True)[0]
    pairs = {}
    for path, slots in sites.items():
        alpha = slots.pop("alpha", None)
        pairs[path] = checked(where, path, slots, number(alpha, where, path))
    return pairs


def number(value: Tensor | None, where: str, path: str) -> float | None:
    """An alpha as a number.

    Raises:
        CheckpointError: it is not one number.
    """
    if value is not None and value.numel() != 1:
        raise CheckpointError(f"{where}: the alpha of {shown(path)} is not one number.")
    return None if value is None else float(value)


FORMATS.register(Diffusers.name, Diffusers())
