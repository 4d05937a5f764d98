"""The checks of files: one file for each group of them. They run in the order of the import."""

from multigraft.diagnosis.checks import config, names, shapes, values, base  # noqa: I001
from multigraft.diagnosis.checks.contract import CHECKS

__all__ = ["CHECKS", "base", "config", "names", "shapes", "values"]
