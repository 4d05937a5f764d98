"""The contract of a task: what an example is, which model learns it, and how wrong the model is.

The training loop knows none of them: it joins batches, runs the model, sums what `losses` gives
for each adapter's rows, and divides by `count`. A new task is one file:

    task = task_of({"name": "dpo", "beta": 0.1})      # a name alone has the usual options
    task = task.settled(records)                      # labels, where the data tells them
    model = attach(task.load("…"), config, "a", task_type=task.task_type)

A task is immutable. Its dataclass fields are its options, which check themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from multigraft.errors import ConfigError, did_you_mean, there_are
from multigraft.model import PeftModel
from multigraft.registry import Registry
from multigraft.train.batches import Batch
from multigraft.train.encode import Encoded, Span
from multigraft.train.examples import Example
from multigraft.train.records import LANGUAGE, Record

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Task:
    """One way to learn from data.

    Class attributes:
        name: as ``task:`` in a run's file gives it.
        task_type: PEFT's name of it, which goes into the adapter's config.
        packs: whether several examples may share a row.
        generates: whether exact match of what the model writes is a measure.
        call: what every forward is given besides the batch's inputs.
        records: kinds of records that it can learn from; they decide which formats are looked for.
        example: what `pieces` makes of them.
        unit: what `learned` counts.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    packs: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    call: ClassVar[Mapping[str, Any]] = {}
    records: ClassVar[tuple[type[Record], ...]] = LANGUAGE
    example: ClassVar[type[Example]] = Encoded
    unit: ClassVar[str] = "tokens"

    def settled(self, records: Iterable[Any]) -> Self:
        """This task with all that it needs to know before a model is loaded, such as its labels.

        The same records give the same task, in whatever order they come.

        Args:
            records: those of every source that will be learned from; a task that needs to know
                nothing of them reads none, so a generator costs nothing.

        Raises:
            DataError: they do not say it.
        """
        return self

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        """The base model, in evaluation mode; the task is settled.

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

    def spans(self, example: Any, tokenizer: Any) -> list[Span]:
        """An example as people read it, cut where learning begins and ends."""
        raise NotImplementedError

    def learned(self, example: Any) -> int:
        """How much of it is learned."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Any], pad: int) -> Batch:
        """Examples as one batch, as wide as the longest.

        An example may have several rows, which stay side by side.
        """
        raise NotImplementedError

    def prepare(self, model: PeftModel, batch: Batch) -> Batch:
        """The batch with what must be known before the model learns from it; nothing by default."""
        return batch

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """What each row adds to the loss, ``(rows,)``, in float32 at least.

        Args:
            outputs: the model's, for this batch.
            batch: one, or several joined, of which none changes another's losses.
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


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least, which sums of many losses need."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


TASKS: Registry[type[Task]] = Registry("task")


def task_of(value: str | Mapping[str, Any] | Task) -> Task:
    """The task that a name or a mapping of ``name`` and options stands for.

    Raises:
        UnsupportedError: there is no task of that name.
        ConfigError: it has no such option, or an option's value is outside what it allows.
    """
    if isinstance(value, Task):
        return value
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise ConfigError(
            f"`task` (={value!r}) must be a name, or a mapping with a `name` and options, as "
            f"{{name: dpo, beta: 0.1}} is.{there_are(TASKS)}"
        )
    chosen = TASKS[options["name"]]
    known = [field.name for field in dataclasses.fields(chosen)]
    for key in options:
        if key != "name" and key not in known:
            raise ConfigError(
                f"task `{chosen.name}` has no option `{key}`.{did_you_mean(str(key), known)}"
                f"{there_are(known) or ' It has none.'}"
            )
    given = {key: _frozen(each) for key, each in options.items() if key != "name"}
    return chosen(**given)


def described(task: Task) -> dict[str, Any]:
    """The task as a mapping that JSON can hold, and of which `task_of` makes the same task."""
    return {"name": task.name, **dataclasses.asdict(task)}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
