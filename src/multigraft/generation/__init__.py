"""Text from a base model and its adapters, side by side: in one batch, or in a conversation."""

from multigraft.generation.conversation import Conversation
from multigraft.generation.ensemble import BASE, Ensemble, load_ensemble, shown
from multigraft.generation.prompts import Prompt, plain_prompts, read_prompts
from multigraft.generation.sampling import Sampling
from multigraft.generation.write import OnText, Written, write

__all__ = [
    "BASE",
    "Conversation",
    "Ensemble",
    "OnText",
    "Prompt",
    "Sampling",
    "Written",
    "load_ensemble",
    "plain_prompts",
    "read_prompts",
    "shown",
    "write",
]
