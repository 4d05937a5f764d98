"""What is asked of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multigraft.config import PeftConfig
from multigraft.errors import ConfigError, did_you_mean
from multigraft.planning.sizes import bytes_of, memory_here

DEVICES = ("cuda", "cpu")
PER_EXAMPLE = {"dpo": 2, "embed": 2}
"""Rows that an example has in tasks where it has several: what is preferred and what is not."""
HEADS = {
    "seq-cls": "AutoModelForSequenceClassification",
    "token-cls": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "embed": "AutoModel",
}
"""Classes of transformers that a task puts on a base; of other tasks, the base's own."""


@dataclass(frozen=True)
class Load:
    """What an adapter puts into a forward: rows, each of so many tokens."""

    name: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class Request:
    """A training step on paper.

    Args:
        model: a directory, an id on the hub, a config of transformers, or a model.
        adapters: configs by name; all of them train in every step.
        batch_size: examples of each adapter, one number for all, or by name.
        max_length: tokens of a row, likewise.
        dtype: of the base.
        quantize: None, ``"nf4"``, ``"fp4"`` or ``"int8"``.
        optimizer: its name in a run.
        gradient_checkpointing: blocks are computed again in the backward pass.
        accumulate: parts of a step that run one after another.
        device: whose kernels are counted with, ``"cuda"`` or ``"cpu"``.
        memory: bytes, or text such as ``"80GiB"``; the first GPU's by default.
        ranks: how many each layer is divided over, by tensor parallelism.
        task: what is learned, by its name in a run.
    """

    model: Any
    adapters: Mapping[str, PeftConfig]
    batch_size: int | Mapping[str, int] = 8
    max_length: int | Mapping[str, int] = 1024
    dtype: str = "auto"
    quantize: str | None = None
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    accumulate: int = 1
    device: str = "cuda"
    memory: str | int | None = None
    ranks: int = 1
    task: str = "causal-lm"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "accumulate", "ranks"):
            self._check_names(name)
            for value in _values(getattr(self, name)):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least 1.")
        if self.device.partition(":")[0] not in DEVICES:
            raise ConfigError(
                f"`device` (={self.device!r}) must be one of {', '.join(DEVICES)}."
                f"{did_you_mean(self.device, DEVICES)}"
            )
        if self.memory is not None:
            bytes_of(self.memory)

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        lacking = [a for a in self.adapters if isinstance(value, Mapping) and a not in value]
        if lacking:
            raise ConfigError(f"`{name}` says nothing of adapter `{lacking[0]}`.")

    def loads(self, rows: int | None = None) -> list[Load]:
        """What each adapter puts into a forward.

        Args:
            rows: examples of each, in place of those that are asked for.
        """
        each = PER_EXAMPLE.get(self.task, 1)
        return [
            Load(
                name,
                each * (_of(self.batch_size, name) if rows is None else rows),
                _of(self.max_length, name),
            )
            for name in self.adapters
        ]

    @property
    def most_rows(self) -> int:
        """The most examples of an adapter."""
        return max(_values(self.batch_size))

    @property
    def longest(self) -> int:
        """Tokens of the longest rows."""
        return max(_values(self.max_length))

    @property
    def head(self) -> str | None:
        """The class that the task puts on the base, if it does."""
        return HEADS.get(self.task)

    @property
    def available(self) -> int | None:
        """Bytes that there are, if anybody knows."""
        if self.memory is not None:
            return bytes_of(self.memory)
        return None if self.device == "cpu" else memory_here()

    def but(self, **changes: Any) -> Request:
        """The same with other values."""
        return dataclasses.replace(self, **changes)


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _of(value: int | Mapping[str, int], name: str) -> int:
    return value[name] if isinstance(value, Mapping) else value
