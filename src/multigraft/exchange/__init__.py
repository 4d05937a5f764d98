"""Adapters for other programs, and from them: `export` and `convert`."""

from multigraft.exchange import consumers, formats
from multigraft.exchange.contract import CONSUMERS, FORMATS, Outcome
from multigraft.exchange.convert import convert
from multigraft.exchange.export import export

__all__ = ["CONSUMERS", "FORMATS", "Outcome", "consumers", "convert", "export", "formats"]
