"""Ways to write low-rank pairs into files, one module each; the more special first."""

from multigraft.exchange.formats import gguf, peft

__all__ = ["gguf", "peft"]
