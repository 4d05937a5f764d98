"""Variants of LoRA: one file each. The import list is explicit and sorted."""

from multigraft.variants import (
    alora,
    arrow,
    bdlora,
    dora,
    kasa,
    loftq,
    mica,
    monteclora,
    qalora,
    velora,
)
from multigraft.variants.contract import VARIANTS, Variant, check_options, variant, variant_for

__all__ = [
    "VARIANTS",
    "Variant",
    "alora",
    "arrow",
    "bdlora",
    "check_options",
    "dora",
    "kasa",
    "loftq",
    "mica",
    "monteclora",
    "qalora",
    "variant",
    "variant_for",
    "velora",
]
