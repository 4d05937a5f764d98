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
from multigraft.variants._runtime import LoraRuntimeConfig, runtime_of
from multigraft.variants.contract import VARIANTS, Variant, check_options, variant, variant_for

__all__ = [
    "VARIANTS",
    "LoraRuntimeConfig",
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
    "runtime_of",
    "variant",
    "variant_for",
    "velora",
]
