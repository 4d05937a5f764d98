"""Ways to write low-rank pairs into files, one module each; the more special first."""

from multigraft.exchange.formats import peft

__all__ = ["peft"]
