"""Paths of modules out of kohya's flat names, where every dot became an underscore."""

from __future__ import annotations

import re
from functools import lru_cache

from multigraft.errors import UnsupportedError
from multigraft.reading import shown

_WORDS = """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks single_transformer_blocks
    downsamplers upsamplers attn attn1 attn2 to_q to_k to_v to_out to_add_out add_q_proj add_k_proj
    add_v_proj proj_in proj_out proj_mlp ff ff_context net proj conv conv1 conv2 conv_in conv_out
    conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 linear norm1
    norm1_context norm_out norm context_embedder x_embedder time_text_embed timestep_embedder
    guidance_embedder text_embedder caption_projection text_model encoder layers self_attn q_proj
    k_proj v_proj out_proj mlp fc1 fc2 text_projection block layer SelfAttention DenseReluDense q k
    v o wi_0 wi_1 wo model gate_proj up_proj down_proj o_proj
"""
WORDS = frozenset(_WORDS.split())
"""Names of modules in diffusers' and transformers' models that LoRAs act on."""
LONGEST = max(word.count("_") for word in WORDS) + 1
PARTS = 64
"""More components than any flat name has."""

RESNETS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


@lru_cache(1 << 14)
def dotted(flat: str, where: str) -> str:
    """The path of a flat name.

    Raises:
        UnsupportedError: it can be read in no way, or in two that are equally short.
    """
    found = _shortest(tuple(_as_diffusers(flat).split("_")))
    if len(found) != 1:
        how = "no way that is known" if not found else f"two ways, {found[0]} and {found[1]}"
        raise UnsupportedError(
            f"{where}: {shown(flat)} can be read in {how}. Load the file in diffusers, which knows "
            "the model, and save it there."
        )
    return found[0]


def _as_diffusers(flat: str) -> str:
    """A name of the original Stable Diffusion code, three layers to a block, as diffusers'."""
    match = re.fullmatch(r"(input|output)_blocks_(\d{1,3})_(\d)_(.+)", flat)
    if match is None:
        match = re.fullmatch(r"middle_block_([012])_(.+)", flat)
        if match is None:
            return flat
        kind, number = ("attentions", 0) if match[1] == "1" else ("resnets", int(match[1]) // 2)
        return f"mid_block_{kind}_{number}_{RESNETS.get(match[2], match[2])}"
    way, index, inner, rest = match[1], int(match[2]), int(match[3]), match[4]
    index -= way == "input"
    block, layer = f"{'down' if way == 'input' else 'up'}_blocks_{index // 3}", index % 3
    if rest == "op" and way == "input":
        return f"{block}_downsamplers_0_conv"
    if rest == "conv" and way == "output":
        return f"{block}_upsamplers_0_conv"
    if inner == 0:
        return f"{block}_resnets_{layer}_{RESNETS.get(rest, rest)}"
    return f"{block}_attentions_{layer}_{rest}"


def _shortest(parts: tuple[str, ...]) -> list[str]:
    """The readings with the fewest components, at most two of them."""
    if len(parts) > PARTS:
        return []
    best: list[list[tuple[str, ...]]] = [[()]]
    for end in range(1, len(parts) + 1):
        readings: list[tuple[str, ...]] = []
        for begin in range(max(0, end - LONGEST), end):
            word = "_".join(parts[begin:end])
            if word in WORDS or (begin == end - 1 and word.isdecimal()):
                readings += [(*reading, word) for reading in best[begin]]
        fewest = min(map(len, readings), default=0)
        best.append([r for r in readings if len(r) == fewest][:2])
    return [".".join(reading) for reading in best[-1]]
