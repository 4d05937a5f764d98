"""Causal language modelling: the next token, of what is to be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from multigraft.train.batches import Batch, collate
from multigraft.train.encode import Encoded, Span, pieces_of
from multigraft.train.load import load_model
from multigraft.train.spelling import spans_of
from multigraft.train.tasks.contract import TASKS, Task, widened


@dataclass(frozen=True)
class CausalLM(Task):
    """Completions, assistants' turns and texts; the loss is the mean over learned tokens."""

    name: ClassVar[str] = "causal-lm"
    task_type: ClassVar[str] = "CAUSAL_LM"
    packs: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    call: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        return load_model(source, dtype=dtype, device=device, quantize=quantize)

    def pieces(self, record: Any, tokenizer: Any, max_length: int) -> tuple[list[Encoded], bool]:
        return pieces_of(record, tokenizer, max_length)

    def spans(self, example: Encoded, tokenizer: Any) -> list[Span]:
        return spans_of(example, tokenizer)

    def learned(self, example: Encoded) -> int:
        return sum(example.learned[1:])  # the first token is never predicted

    def collate(self, examples: Sequence[Encoded], pad: int) -> Batch:
        return collate(examples, pad)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return row_losses(outputs.logits, batch.labels)

    def count(self, batch: Batch) -> int:
        return learned_tokens(batch.labels)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row's learned tokens, summed in float32 at least.

    Args:
        logits: ``(rows, tokens, vocabulary)``; those at a token predict the next one. There may be
            more, of virtual tokens in front, of which nothing is learned.
        labels: ``(rows, tokens)``, `IGNORED` where nothing is learned.

    Returns:
        ``(rows,)``; rows of which nothing is learned have 0.
    """
    logits, targets = logits[:, -labels.shape[1] :], labels[:, 1:]
    rows, places = (targets >= 0).nonzero(as_tuple=True)
    losses = nn.functional.cross_entropy(
        widened(logits[rows, places]), targets[rows, places], reduction="none"
    )
    return losses.new_zeros(len(labels)).index_add(0, rows, losses)


def learned_tokens(labels: Tensor) -> int:
    """How many tokens a batch's loss is the mean over."""
    return int((labels[:, 1:] >= 0).sum())


TASKS.register(CausalLM.name, CausalLM)
