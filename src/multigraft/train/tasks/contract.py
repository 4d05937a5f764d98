"""The contract of a task: what an example is, which model learns it, and how wrong the model is.

The training loop knows none of them: it joins batches, runs the model, sums what `losses` gives
for each adapter's rows, and divides by `count`. A new task is one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from multigraft.model import PeftModel
from multigraft.registry import Registry
from multigraft.train.batches import Batch


class Task:
    """One way to learn from data.

    Class attributes:
        name: as ``task:`` in a run's file gives it.
        task_type: PEFT's name of it, which goes into the adapter's config.
        packs: whether several examples may share a row.
        generates: whether exact match of what the model writes is a measure.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    packs: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        """The base model, in evaluation mode.

        Raises:
            CheckpointError: there is none of this kind at ``source``.
        """
        raise NotImplementedError

    def pieces(self, record: Any, tokenizer: Any, max_length: int) -> tuple[list[Any], bool]:
        """A record's examples, and whether something was cut from it.

        Raises:
            Refusal: the task cannot use this record.
        """
        raise NotImplementedError

    def collate(self, examples: Sequence[Any], pad: int) -> Batch:
        """Examples as one batch, as wide as the longest."""
        raise NotImplementedError

    def prepare(self, model: PeftModel, batch: Batch) -> Batch:
        """The batch with what must be known before the model learns from it; nothing by default."""
        return batch

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """What each row adds to the loss, ``(rows,)``, in float32.

        Args:
            outputs: the model's, for this batch.
        """
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """What the sum of the losses is divided by: learned tokens, examples or pairs."""
        raise NotImplementedError

    def measures(
        self, model: PeftModel, examples: Sequence[Any], *, pad: int, batch_size: int
    ) -> dict[str, float]:
        """Measures beside the loss on held-out examples, with the active adapters, by name."""
        return {}


TASKS: Registry[Task] = Registry("task")
