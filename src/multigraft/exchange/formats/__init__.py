"""Ways to write low-rank pairs into files, one module each."""

from multigraft.exchange.formats import diffusers, gguf, kohya, peft

__all__ = ["diffusers", "gguf", "kohya", "peft"]
