"""GGUF files with a LoRA, as llama.cpp reads them; through the optional package `gguf`.

llama.cpp multiplies by ``adapter.lora.alpha / rank``, with one alpha for the file and each tensor's
own rank. An alpha of 0 means a scale of 1 there, so it is never written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multigraft.errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedError
from multigraft.exchange.base import base_config, named_base
from multigraft.exchange.contract import (
    FORMATS,
    MERGE_FIRST,
    Files,
    Format,
    Loras,
    Options,
    Pair,
)
from multigraft.exchange.folding import folded, usual_scale
from multigraft.exchange.llamacpp import (
    ARCHITECTURES,
    SUFFIXES,
    Architecture,
    architecture_of,
    gguf_name,
    halved,
    heads_of,
    interleaved,
    path_of,
)
from multigraft.exchange.plain import checked
from multigraft.reading import TENSORS, shown

MAGIC = b"GGUF"
Made = tuple[Architecture, dict[str, Any], float, dict[str, Tensor]]
"""The architecture, the base's config, alpha, and the tensors as the file has them."""
KEYS = 1 << 16
"""How many entries of metadata are read; a whole model has some dozens."""


def require_package() -> Any:
    """The package `gguf`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "GGUF files need the package gguf: pip install 'multigraft[gguf]'"
        ) from error
    return gguf


class GGUF(Format):
    """llama.cpp's files."""

    name = "gguf"

    def recognises(self, source: Path, names: Collection[str]) -> bool:
        if not source.is_file():
            return False
        with open(source, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def read(self, source: Path, options: Options) -> Loras:
        keys, tensors = _read(source)
        where = str(source)
        if keys.get("general.type") != "adapter" or keys.get("adapter.type") != "lora":
            raise CheckpointError(f"{where} holds no LoRA, but a {keys.get('general.type')}.")
        if keys.get("adapter.alora.invocation_tokens") is not None:
            raise UnsupportedError(f"{where} is an activated LoRA, which is not converted.")
        name = keys.get("general.architecture")
        architecture = next((a for a in ARCHITECTURES.values() if a.name == name), None)
        if architecture is None:
            raise UnsupportedError(
                f"{where}: the architecture {shown(str(name))} is not read. Convert the adapter "
                "that the file was made from."
            )
        config = _heads(keys, architecture, options, where)
        alpha = float(keys.get("adapter.lora.alpha") or 0)
        pairs = _pairs(tensors, architecture, config, alpha, where)
        return Loras({options.part or "": pairs}, {options.part or "": {"task_type": "CAUSAL_LM"}})

    def write(self, loras: Loras, target: Path, options: Options) -> Files:
        (part, pairs), *more = loras.parts.items()
        if more:
            raise UnsupportedError(f"{target}: GGUF holds one model's LoRA, not {len(more) + 1}.")
        require_package()
        base = named_base(loras.values.get(part, {}), options.base)
        made = prepared(pairs, base, str(target), loras.notes)
        return {target: lambda path: write(path, *made, {})}


def prepared(pairs: Mapping[str, Pair], base: str | None, where: str, done: list[str]) -> Made:
    """What a file of these pairs holds; what was folded is appended to ``done``.

    Raises:
        ConfigError: no base is named: names and heads are its.
        UnsupportedError: llama.cpp cannot do what the pairs do.
    """
    if base is None:
        raise ConfigError(
            f"{where}: GGUF names tensors by the base's architecture, and neither the adapter nor "
            "--base names one. Name it."
        )
    config = base_config(base)
    architecture = architecture_of(config, where)
    _check(pairs, config, where)
    scale = usual_scale(pairs)
    rank = max(pair.rank for pair in pairs.values())
    # Padded, since the one alpha is divided by each tensor's own rank.
    pairs = folded(pairs, done, rank=rank, scale=scale)
    tensors: dict[str, Tensor] = {}
    for site, pair in pairs.items():
        name = gguf_name(architecture, site, where)
        A, B = pair.A.float(), pair.B.float()
        heads = heads_of(config, site) if architecture.permutes else None
        if heads is not None:
            _check_heads(B, heads, site, where)
            B = interleaved(B, heads)
        tensors[name + SUFFIXES["A"]] = A.T if pair.is_lookup else A
        tensors[name + SUFFIXES["B"]] = B
    return architecture, config, scale * rank, tensors


def write(
    path: Path,
    architecture: Architecture,
    config: Mapping[str, Any],
    alpha: float,
    tensors: Mapping[str, Tensor],
    keys: Mapping[str, str],
) -> None:
    """Fill a file; ``keys`` are further texts in its metadata."""
    gguf = require_package()
    writer = gguf.GGUFWriter(str(path), architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_file_type(0)  # all of it float32
    heads = {"head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads"}
    for key, field in heads.items():
        count = config.get(field) or config.get("num_attention_heads")
        if count:
            writer.add_uint32(f"{architecture.name}.attention.{key}", int(count))
    for key, text in keys.items():
        writer.add_string(key, text)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(pairs: Mapping[str, Pair], config: Mapping[str, Any], where: str) -> None:
    for site, pair in pairs.items():
        if pair.magnitude is not None or pair.A.ndim != 2:
            what = "DoRA's magnitude" if pair.magnitude is not None else "a convolution"
            raise UnsupportedError(
                f"{where}: {shown(site)} has {what}, which llama.cpp does not read. {MERGE_FIRST}"
            )
    is_tied = config.get("tie_word_embeddings", True)
    if "lm_head" in pairs and is_tied:
        raise UnsupportedError(
            f"{where}: `lm_head` is the embedding's own matrix in this base, and llama.cpp would "
            f"drop its pair. {MERGE_FIRST}"
        )


def _check_heads(B: Tensor, heads: int, site: str, where: str) -> None:
    if heads < 1 or B.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{where}: {shown(site)} has {B.shape[0]} outputs, which {heads} heads of an even size "
            "do not make. Is this the right base?"
        )


def _heads(
    keys: Mapping[str, Any], architecture: Architecture, options: Options, where: str
) -> dict[str, Any]:
    """How many heads there are, from the file or the base's config."""
    begin = f"{architecture.name}.attention.head_count"
    if begin in keys:
        own = {"num_attention_heads": keys[begin], "num_key_value_heads": keys.get(f"{begin}_kv")}
        return own
    if options.base is not None:
        return base_config(options.base)
    if architecture.permutes:
        raise ConfigError(
            f"{where}: llama.cpp permutes rows by heads, and the file does not say how many there "
            "are. Name the base: --base."
        )
    return {}


def _pairs(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    config: Mapping[str, Any],
    alpha: float,
    where: str,
) -> dict[str, Pair]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        slot = next((s for s, end in SUFFIXES.items() if name.endswith(end)), None)
        path = path_of(architecture, name.removesuffix(SUFFIXES[slot])) if slot else None
        if slot is None or path is None:
            raise UnsupportedError(
                f"{where}: {shown(name)} is no pair's of {architecture.name} models that is known "
                "here, and would be dropped. Convert the adapter that the file was made from."
            )
        is_lookup = path == "model.embed_tokens"
        heads = heads_of(config, path) if architecture.permutes and slot == "B" else None
        if heads is not None:
            _check_heads(tensor, heads, path, where)
            tensor = halved(tensor, heads)
        if is_lookup and slot == "A":
            tensor = tensor.T.contiguous()
        found.setdefault(path, {})[slot] = tensor
    lookups = {"model.embed_tokens"}
    return {p: checked(where, p, s, alpha or None, p in lookups) for p, s in found.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's metadata and tensors; the latter in float32, or in float16 where they are.

    Raises:
        CheckpointError: it is damaged.
    """
    gguf = require_package()
    with open(path, "rb") as file:
        head = file.read(24)
    counts = [int.from_bytes(head[i : i + 8], "little") for i in (8, 16)]
    if head[:4] != MAGIC or len(head) < 24 or counts[0] > TENSORS or counts[1] > KEYS:
        raise CheckpointError(f"{path} is damaged or no GGUF file. Copy or download it again.")
    try:
        reader = gguf.GGUFReader(str(path))
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for each in reader.tensors:
            data = each.data
            if each.tensor_type.name not in ("F32", "F16", "F64"):
                data = gguf.quants.dequantize(data, each.tensor_type)
            tensors[each.name] = torch.from_numpy(data.copy())
    except Exception as error:  # whatever the reader trips over in damaged bytes
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    return keys, tensors


FORMATS.register(GGUF.name, GGUF())
