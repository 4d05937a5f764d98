"""Initialisations of LoRA: one file each. The import list is explicit and sorted."""

from multigraft.initialisations import eva, mica, olora, orthogonal, pissa, plain
from multigraft.initialisations.contract import (
    INITIALISATIONS,
    MATRICES,
    START_A,
    START_B,
    STARTS,
    Initialisation,
    initialisation,
    initialisation_for,
    moved,
    settle_options,
)

__all__ = [
    "INITIALISATIONS",
    "MATRICES",
    "START_A",
    "START_B",
    "STARTS",
    "Initialisation",
    "eva",
    "initialisation",
    "initialisation_for",
    "mica",
    "moved",
    "olora",
    "orthogonal",
    "pissa",
    "plain",
    "settle_options",
]
