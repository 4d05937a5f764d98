"""An adapter's file read by transformers' own loader: which name in it is which parameter.

    base_model.model.layers.0.q_proj.lora_A.weight      in the file
                     layers.0.q_proj.lora_A.default.weight    in the model

That is the rule; `with_adapter` states it. Where a name departs from it (saved modules, single
tokens, stacked experts), the adapted layer says so: `LayerVerbs.adapter_state_dict_load_map`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from multigraft.keys import PREFIX
from multigraft.methods import METHODS

BARE = "lora_magnitude_vector"
"""Files have this one without its ``.weight``."""


def with_adapter(key: str, adapter: str) -> str:
    """A name in a file, relative to the base model, as the rule has it in memory."""
    for pattern, replacement in _rules(adapter):
        key = re.sub(pattern, replacement, key, count=1)
    return key


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Transformers' conversions for one adapter's file.

    Args:
        weight_conversions: those of the model's own checkpoints, whose renamings hold for adapters
            as well. Converters of weights have no meaning for factors and are left out.
        peft_config: the adapter's; kept for PEFT's signature.
    """
    from transformers.core_model_loading import WeightRenaming

    own = [each for each in weight_conversions or () if isinstance(each, WeightRenaming)]
    rules = [(rf"^{re.escape(PREFIX)}", ""), *_rules(adapter_name)]
    return [*(WeightRenaming(pattern, replacement) for pattern, replacement in rules), *own]


def _rules(adapter: str) -> list[tuple[str, str]]:
    """Patterns and what takes their place, in this order."""
    prefixes = sorted({METHODS[name].prefix for name in METHODS if METHODS[name].prefix[-1] == "_"})
    groups = "|".join(re.escape(prefix) for prefix in prefixes)
    return [(rf"\.{BARE}$", f".{BARE}.weight"), (rf"\.((?:{groups})[^.]*)", rf".\1.{adapter}")]
