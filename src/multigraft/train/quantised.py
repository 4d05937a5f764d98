"""Loading a base model with quantised linear layers: transformers and bitsandbytes do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from multigraft.errors import ConfigError, MissingExtraError, did_you_mean

FORMATS = ("nf4", "fp4", "int8")


def load_options(
    quantize: str,
    device: torch.device,
    dtype: torch.dtype | str,
    transformers: Any,
    dense: Sequence[str] = (),
) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise every linear layer but the head as it loads it.

    Args:
        quantize: one of `FORMATS`; the 4-bit ones quantise their block statistics as well.
        dense: names of modules that stay as they are; the usual ones where there are none.
        dtype: of everything that stays as it is, and of the 4-bit layers' arithmetic.

    Raises:
        ConfigError: there is no such format.
        MissingExtraError: bitsandbytes is not installed.
    """
    check_format(quantize)
    try:
        import bitsandbytes  # noqa: F401 (transformers' own message names other things)
    except ImportError as error:
        raise MissingExtraError(
            "quantised bases need bitsandbytes: pip install 'multigraft[quant]'"
        ) from error
    skipped = list(dense) or None
    if quantize == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def check_format(quantize: str) -> None:
    """Fail when there is no such format.

    Raises:
        ConfigError: there is none.
    """
    if quantize not in FORMATS:
        raise ConfigError(
            f"`quantize` (={quantize!r}) must be one of {', '.join(FORMATS)}."
            f"{did_you_mean(quantize, FORMATS)}"
        )
