"""Adapter arithmetic: one file a rule. The import list is explicit and sorted."""

from multigraft.combine import cat, dare, linear, magnitude_prune, svd, ties
from multigraft.combine.contract import RULES, Options, Rule, rules

__all__ = [
    "RULES",
    "Options",
    "Rule",
    "cat",
    "dare",
    "linear",
    "magnitude_prune",
    "rules",
    "svd",
    "ties",
]
