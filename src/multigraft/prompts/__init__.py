"""Context methods: one file each. The import list is explicit and sorted."""

from multigraft.prompts import adaption, p_tuning, prefix_tuning, prompt_tuning
from multigraft.prompts.config import words_of
from multigraft.prompts.contract import CONTEXTS, Context, context, grow, shapes

__all__ = [
    "CONTEXTS",
    "Context",
    "adaption",
    "context",
    "grow",
    "p_tuning",
    "prefix_tuning",
    "prompt_tuning",
    "shapes",
    "words_of",
]
