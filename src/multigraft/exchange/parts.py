"""Which model a single file's pairs belong to, where several models share one file."""

from __future__ import annotations

from collections.abc import Mapping

from multigraft.errors import ConfigError
from multigraft.exchange.contract import Loras, Options, Pair

TELLING = {
    "unet": ("down_blocks.", "up_blocks.", "mid_block."),
    "text_encoder": ("text_model.",),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
}
"""How the paths of models begin that are alike in every pipeline."""


def named_parts(loras: Loras, options: Options) -> dict[str, dict[str, Pair]]:
    """Pairs by model, the one without a name named.

    Raises:
        ConfigError: its paths do not tell which it is, and the user has not said.
    """
    return {part or _guessed(pairs, options): pairs for part, pairs in loras.parts.items()}


def _guessed(pairs: Mapping[str, Pair], options: Options) -> str:
    if options.part:
        return options.part
    for name, begins in TELLING.items():
        if all(path.startswith(begins) for path in pairs):
            return name
    raise ConfigError(
        f"the file must say which model `{next(iter(pairs))}` is in, and its path does not tell. "
        "Name it: --part unet, transformer, text_encoder, text_encoder_2, …"
    )
