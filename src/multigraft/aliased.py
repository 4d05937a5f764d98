"""Whether Multigraft stands for PEFT in this process."""

from __future__ import annotations

import sys

FLAG = "_hf_peft_config_loaded"
"""What transformers and diffusers look at to know that a model has adapters in place."""


def is_aliased() -> bool:
    """Whether ``import peft`` means Multigraft now (`multigraft.compat`)."""
    return any(getattr(finder, "stands_for", "") == "peft" for finder in sys.meta_path)
