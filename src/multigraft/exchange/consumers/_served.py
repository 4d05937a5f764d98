"""What programs that read PEFT's folders have in common: one rank, one scale, pairs alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from multigraft.atomic import write_utf8
from multigraft.errors import UnsupportedError, listed
from multigraft.exchange.base import named_base
from multigraft.exchange.chat import carried, chat_of
from multigraft.exchange.contract import MERGE_FIRST, Adapter, Files, Options, Outcome
from multigraft.exchange.folding import as_number, folded, usual_scale
from multigraft.exchange.formats.peft import LEAVES, LOOKUP_LEAVES
from multigraft.keys import full_key
from multigraft.reading import CONFIG_NAME, WEIGHTS_NAME
from multigraft.writing import write_tensors

PLAIN: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def check_matrices(adapter: Adapter, title: str) -> None:
    """Fail on pairs of more than two dimensions.

    Raises:
        UnsupportedError: naming them.
    """
    others = [site for site, pair in adapter.pairs.items() if pair.A.ndim != 2]
    if others:
        raise UnsupportedError(
            f"{adapter.source}: {listed(others, 4)} belong to convolutions, which {title} does not "
            f"adapt. {MERGE_FIRST}"
        )


def served(
    adapter: Adapter, target: Path, options: Options, outcome: Outcome, **values: Any
) -> Files:
    """PEFT's two files with one rank and one scale, and the tokeniser's beside them.

    Args:
        values: of the config, in place of the adapter's own.
    """
    rank = max(pair.rank for pair in adapter.pairs.values())
    scale = usual_scale(adapter.pairs)
    pairs = folded(adapter.pairs, outcome.done, rank=rank, scale=scale)
    tensors = {}
    for site, pair in pairs.items():
        a, b = LOOKUP_LEAVES if pair.is_lookup else LEAVES
        tensors[full_key(f"{site}.{a}")] = pair.A
        tensors[full_key(f"{site}.{b}")] = pair.B
    if adapter.values.get("use_rslora"):
        outcome.done.append("wrote rsLoRA's scale as `lora_alpha`")
    config = {**adapter.values, **PLAIN, **values, "r": rank, "lora_alpha": as_number(scale * rank)}
    config["init_lora_weights"] = True
    text = json.dumps(config, indent=2, sort_keys=True)
    base = named_base(adapter.values, options.base)
    chat = chat_of([adapter.source, base])
    return {
        target / WEIGHTS_NAME: partial(write_tensors, tensors),
        target / CONFIG_NAME: partial(write_utf8, text=text),
        **carried(chat, target, outcome),
    }
