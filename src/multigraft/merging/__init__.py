"""A base model and adapters on disk into one new model, streamed: never all of it in memory."""

from multigraft.merging.check import Verdict
from multigraft.merging.job import CHECKS, Merged, merge_files

__all__ = ["CHECKS", "Merged", "Verdict", "merge_files"]
