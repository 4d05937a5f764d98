"""Initialisations of LoRA: one file each. The import list is explicit and sorted."""

from multigraft.initialisations import (
    corda,
    eva,
    loftq,
    lora_ga,
    mica,
    olora,
    orthogonal,
    pissa,
    plain,
)
from multigraft.initialisations.contract import (
    INITIALISATIONS,
    MATRICES,
    START_A,
    START_B,
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
    "Initialisation",
    "corda",
    "eva",
    "initialisation",
    "initialisation_for",
    "loftq",
    "lora_ga",
    "mica",
    "moved",
    "olora",
    "orthogonal",
    "pissa",
    "plain",
    "settle_options",
]
