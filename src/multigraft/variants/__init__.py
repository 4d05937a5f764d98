"""Variants of LoRA: one file each. The import list is explicit and sorted."""

from multigraft.variants import bdlora, dora, qalora
from multigraft.variants.contract import VARIANTS, Variant, check_options, variant, variant_for

__all__ = ["VARIANTS", "Variant", "check_options", "dora", "variant", "variant_for"]
