"""Watching an adapter while it learns: held-out examples, early stop, and the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from multigraft.errors import ConfigError
from multigraft.model import PeftModel
from multigraft.train.encode import encode_one
from multigraft.train.evaluate import Answer, answer, mean_loss
from multigraft.train.load import pad_token
from multigraft.train.records import Chat, Pair, Record
from multigraft.train.tasks import Task

ROWS = 16
"""Examples that are evaluated at once."""
MOST_ANSWERS = 200
"""Of how many held-out examples the answers are generated: it takes far longer than their loss."""


@dataclass(frozen=True)
class Watch:
    """When an adapter is evaluated, and what follows from it.

    Args:
        every: steps from one evaluation to the next; None for one before the first step and one
            after the last.
        patience: after how many evaluations without a better one the adapter stops learning; None
            for never.
        keep_best: whether the values of the best evaluation are kept, or else the last ones.
        measure: what is compared: ``"loss"``, or a measure of the task, of which more is better.

    Raises:
        ConfigError: a value is outside what its field allows.
    """

    every: int | None = None
    patience: int | None = None
    keep_best: bool = True
    measure: str = "loss"

    def __post_init__(self) -> None:
        for name, value in (("eval_every", self.every), ("patience", self.patience)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least 1.")
        if self.patience is not None and self.every is None:
            raise ConfigError(
                f"`patience` (={self.patience}) counts evaluations: say with `eval_every` how many "
                "steps lie between them."
            )

    @property
    def needs_held_out(self) -> bool:
        """Whether it says anything that held-out examples are needed for."""
        return self.every is not None or self.patience is not None or self.measure != "loss"

    def is_due(self, step: int, steps: int) -> bool:
        """Whether there is an evaluation after this step."""
        return step >= steps or (self.every is not None and step % self.every == 0)

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value beats the best one before it."""
        return value < best if self.measure == "loss" else value > best


@dataclass
class HeldOut:
    """Examples that are not learned from.

    Args:
        records: what they were made of, where answers are to be generated.
    """

    task: Task
    examples: Sequence[Any]
    tokenizer: Any
    records: list[Record] = field(default_factory=list)

    def measure(self, model: PeftModel) -> dict[str, float]:
        """The mean loss and the task's own measures, with the active adapters."""
        options: Any = {"pad": pad_token(self.tokenizer), "batch_size": ROWS}
        loss = mean_loss(model, self.examples, task=self.task, **options)
        return {"loss": loss, **self.task.measures(model, self.examples, **options)}

    def answers(self, model: PeftModel) -> list[Answer]:
        """What the model writes for those records that end with something to write."""
        if not self.task.generates:
            return []
        asked = [r for r in self.records if _ends_with_answer(r)][:MOST_ANSWERS]
        if not asked:
            return []
        longest = max(sum(encode_one(r, self.tokenizer).learned) for r in asked)
        return answer(model, self.tokenizer, asked, max_new_tokens=longest + 8)


def _ends_with_answer(record: Record) -> bool:
    if isinstance(record, Chat):
        return record.messages[-1]["role"] == "assistant"
    return isinstance(record, Pair)
