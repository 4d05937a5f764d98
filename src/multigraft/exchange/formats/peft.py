"""PEFT's folders: one of a single model, or one folder a model, named like it."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from multigraft.atomic import write_utf8
from multigraft.errors import UnsupportedError
from multigraft.exchange.contract import FORMATS, Files, Format, Loras, Options, Pair
from multigraft.exchange.folding import as_number
from multigraft.exchange.plain import pairs_of, refuse_rest
from multigraft.inspection.files import folders_in, read_adapter
from multigraft.keys import full_key
from multigraft.methods.lora import LoraConfig
from multigraft.reading import CONFIG_NAME, WEIGHTS_NAME
from multigraft.writing import write_tensors

LEAVES = ("lora_A.weight", "lora_B.weight")
LOOKUP_LEAVES = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
FOLLOWED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""What the pairs say themselves."""


class PEFT(Format):
    """PEFT's two files a model."""

    name = "peft"
    is_folder = True

    def recognises(self, source: Path, names: Collection[str]) -> bool:
        return source.is_dir() and bool(folders_in(source))

    def read(self, source: Path, options: Options) -> Loras:
        folders = folders_in(source)
        loras = Loras({})
        for folder in folders:
            files = read_adapter(folder, allow_pickle=options.allow_pickle)
            pairs, rest = pairs_of(files.config, files.tensors, str(folder), keeps_dora=True)
            refuse_rest(str(folder), rest)
            part = folder.name if folder != source or len(folders) > 1 else ""
            part = options.part or part if len(folders) == 1 else part
            loras.parts[part] = pairs
            kept = {k: v for k, v in files.values.items() if k not in FOLLOWED}
            loras.values[part] = kept
        return loras

    def write(self, loras: Loras, target: Path, options: Options) -> Files:
        files: Files = {}
        for part, pairs in loras.parts.items():
            folder = target / part if len(loras.parts) > 1 else target
            config = config_of(pairs, loras.values.get(part, {}))
            files[folder / WEIGHTS_NAME] = partial(write_tensors, tensors_of(pairs))
            files[folder / CONFIG_NAME] = partial(write_utf8, text=config.to_json())
        return files


def tensors_of(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Pairs under the names that PEFT's files have."""
    tensors = {}
    for site, pair in pairs.items():
        a, b = LOOKUP_LEAVES if pair.is_lookup else LEAVES
        tensors[full_key(f"{site}.{a}")] = pair.A
        tensors[full_key(f"{site}.{b}")] = pair.B
        if pair.magnitude is not None:
            tensors[full_key(f"{site}.{MAGNITUDE}")] = pair.magnitude
    return tensors


def config_of(pairs: Mapping[str, Pair], values: Mapping[str, Any]) -> LoraConfig:
    """The config of these pairs: the usual rank and alpha, and patterns for the others.

    Raises:
        UnsupportedError: DoRA acts at some of the layers only, which no config can say.
    """
    has_magnitude = {pair.magnitude is not None for pair in pairs.values()}
    if len(has_magnitude) > 1:
        raise UnsupportedError(
            "DoRA's magnitudes are at some layers and not at others, which one PEFT config cannot "
            "say. Split the file."
        )
    rank = Counter(p.rank for p in pairs.values()).most_common(1)[0][0]
    alpha = Counter(as_number(p.alpha) for p in pairs.values()).most_common(1)[0][0]
    ranks = {re.escape(s): p.rank for s, p in pairs.items() if p.rank != rank}
    alphas = {re.escape(s): as_number(p.alpha) for s, p in pairs.items()}
    known = {f for f in LoraConfig.__dataclass_fields__ if f not in FOLLOWED}
    given = {k: v for k, v in values.items() if k in known and v is not None}
    given.setdefault("target_modules", sorted(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig(
            **given,
            r=rank,
            lora_alpha=alpha,
            rank_pattern=ranks,
            alpha_pattern={s: a for s, a in alphas.items() if a != alpha},
            use_dora=has_magnitude == {True},
        )


FORMATS.register(PEFT.name, PEFT())
