"""A PEFT adapter as low-rank pairs, where that is what it is.

Everything that changes outputs beyond the pairs is named and refused; what is left over among the
tensors is handed on by name, so that nothing disappears.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from multigraft import initialisations
from multigraft.config import PeftConfig, pattern_value
from multigraft.diagnosis.names import nested, parsed
from multigraft.errors import CheckpointError, UnsupportedError, listed
from multigraft.exchange.contract import MERGE_FIRST, Pair
from multigraft.finite import is_finite
from multigraft.methods.lora import LoraConfig
from multigraft.reading import shown

SLOTS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}
TRAINING_ONLY = ("lora_dropout", "megatron_core", "megatron_config", "runtime_config")


def pairs_of(
    config: PeftConfig, tensors: Mapping[str, Tensor], where: str, *, keeps_dora: bool = False
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Pairs by base path, and the tensors that are no pair's.

    Args:
        tensors: by key relative to the base model.
        where: how errors begin.
        keeps_dora: whether magnitudes can be expressed.

    Raises:
        UnsupportedError: the adapter is more than pairs.
        CheckpointError: tensors are missing, or contradict each other or the config.
    """
    reasons = list(_more_than_pairs(config, keeps_dora))
    if reasons or not isinstance(config, LoraConfig):
        raise UnsupportedError(f"{where}: {'; '.join(reasons)}. {MERGE_FIRST}")
    found: dict[str, dict[str, Tensor]] = {}
    lookups: set[str] = set()
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = parsed(name)
        slot = SLOTS.get(key.group)
        if slot is None or nested(name) or key.rest not in ((), ("weight",)):
            rest[name] = tensor
            continue
        slots = found.setdefault(key.site, {})
        if slot in slots:
            raise CheckpointError(f"{where}: two tensors are {slot} at {shown(key.site)}.")
        slots[slot] = tensor
        if key.group.startswith("lora_embedding"):
            lookups.add(key.site)
    if not found:
        raise CheckpointError(f"{where}: there is no pair of `lora_A` and `lora_B` in it.")
    pairs = {}
    for site, slots in found.items():
        alpha = alpha_at(config, site)
        pairs[site] = checked(where, site, slots, alpha, site in lookups)
        _check_rank(where, config, site, pairs[site])
    return pairs, rest


def alpha_at(config: LoraConfig, site: str) -> float:
    """The alpha that, over the rank, is the scale of a site, rsLoRA's root included."""
    alpha: float = pattern_value(config.alpha_pattern, site, config.lora_alpha)
    rank: int = pattern_value(config.rank_pattern, site, config.r)
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def checked(
    where: str, site: str, slots: Mapping[str, Tensor], alpha: float | None, is_lookup: bool = False
) -> Pair:
    """A pair of tensors that fit each other; without an alpha, of scale 1.

    Raises:
        CheckpointError: one is missing, misshapen or not finite.
    """
    missing = [slot for slot in ("A", "B") if slot not in slots]
    if missing:
        raise CheckpointError(
            f"{where}: {shown(site)} lacks {missing[0]} of its pair. Copy or download the file "
            "again."
        )
    A, B = slots["A"], slots["B"]
    if A.ndim < 2 or A.ndim != B.ndim or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise CheckpointError(
            f"{where}: at {shown(site)} A {tuple(A.shape)} and B {tuple(B.shape)} are no pair; "
            "required are (rank, in, …) and (out, rank, …)."
        )
    magnitude = slots.get("magnitude")
    if magnitude is not None and tuple(magnitude.shape) != (B.shape[0],):
        raise CheckpointError(
            f"{where}: at {shown(site)} the magnitude {tuple(magnitude.shape)} is not of "
            f"{B.shape[0]} outputs."
        )
    broken = [slot for slot, tensor in slots.items() if not is_finite(tensor)]
    if broken or (alpha is not None and not math.isfinite(alpha)):
        what = broken[0] if broken else "alpha"
        raise CheckpointError(f"{where}: {what} at {shown(site)} holds NaN or infinity.")
    return Pair(A, B, float(A.shape[0]) if alpha is None else alpha, magnitude, is_lookup)


def refuse_rest(where: str, rest: Mapping[str, Tensor]) -> None:
    """Fail where tensors are left that are no pair's.

    Raises:
        UnsupportedError: naming them.
    """
    if rest:
        names = listed([name[:80] for name in sorted(rest)], 4)
        raise UnsupportedError(
            f"{where}: {names} {'is' if len(rest) == 1 else 'are'} no low-rank pair's and would be "
            f"dropped. {MERGE_FIRST}"
        )


def _more_than_pairs(config: PeftConfig, keeps_dora: bool) -> Iterator[str]:
    """What the config means beyond pairs, in words."""
    if not isinstance(config, LoraConfig):
        yield f"its method is {config.peft_type}, and LoRA alone is a low-rank pair"
        return
    for name in ("use_dora", *_EXTRAS):
        value = getattr(config, name)
        if value and not (name == "use_dora" and keeps_dora):
            yield f"`{name}` (={_short(value)}) is more than a low-rank pair"
    if config.bias != "none":
        yield f"`bias` (={config.bias!r}) trains biases of the base"
    start = config.init_lora_weights
    if initialisations.initialisation_for(config).takes_out:
        yield (
            f"`init_lora_weights` (={start!r}) takes a part out of the base's weight (it can be "
            "saved as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=))"
        )
    unknown = [k for k, v in config.extra.items() if v and k not in TRAINING_ONLY]
    if unknown:
        yield f"what {listed(unknown, 4)} in its config means is not known"


_EXTRAS = (
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "alora_invocation_tokens",
)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}…" if len(text) > 60 else text


def _check_rank(where: str, config: LoraConfig, site: str, pair: Pair) -> None:
    rank = pattern_value(config.rank_pattern, site, config.r)
    if rank != pair.rank:
        raise CheckpointError(
            f"{where}: {shown(site)} has rank {pair.rank}, and its config says {rank}, so its "
            "scale is not known. Examine it with `multigraft doctor`."
        )
    has_magnitude = pair.magnitude is not None
    if has_magnitude != config.use_dora:
        raise CheckpointError(
            f"{where}: `use_dora` (={config.use_dora}), and {shown(site)} has "
            f"{'a' if has_magnitude else 'no'} magnitude. Examine it with `multigraft doctor`."
        )
