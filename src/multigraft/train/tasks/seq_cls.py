"""Sequence classification: what a text, or a pair of texts, is; or a value that it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multigraft.errors import CheckpointError, ConfigError, did_you_mean
from multigraft.model import PeftModel
from multigraft.train import scores
from multigraft.train.batches import Batch, masked, padded
from multigraft.train.encode import Span
from multigraft.train.examples import Example
from multigraft.train.heads import HEADS, mark_fresh
from multigraft.train.labels import check_names, class_of, names_in, require_names
from multigraft.train.load import load_as, load_tokenizer, pad_token
from multigraft.train.records import Label, Labelled, Record, Refusal
from multigraft.train.spelling import decoded
from multigraft.train.tasks.contract import TASKS, Task, widened
from multigraft.train.tasks.forwards import gathered

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""Our names, and transformers'."""


@dataclass(frozen=True)
class Classified(Example):
    """Token ids, which of two texts each is of, and the classes or values."""

    ids: list[int]
    segments: list[int]
    classes: list[int]
    values: list[float]

    floats: ClassVar[tuple[str, ...]] = ("values",)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SequenceClassification(Task):
    """One class of several, any number of classes, or values.

    Args:
        labels: names of the classes, in the order of the head's outputs; found in the data where
            none are given. With ``"regression"``, names of the values.
        problem: ``"single"``, ``"multi"`` or ``"regression"``; ``"auto"`` goes by the data: lists
            are several classes, fractions are values, anything else is one class.

    Raises:
        ConfigError: a value is outside what its field allows.
    """

    name: ClassVar[str] = "seq-cls"
    task_type: ClassVar[str] = "SEQ_CLS"
    records: ClassVar[tuple[type[Record], ...]] = (Labelled,)
    example: ClassVar[type[Example]] = Classified
    unit: ClassVar[str] = "labels"

    labels: tuple[str, ...] = ()
    problem: str = "auto"

    def __post_init__(self) -> None:
        check_names(self.labels, self.name)
        if self.problem not in ("auto", *PROBLEMS):
            raise ConfigError(
                f"task `{self.name}`: `problem` (={self.problem!r}) must be one of auto, "
                f"{', '.join(PROBLEMS)}.{did_you_mean(str(self.problem), PROBLEMS)}"
            )

    def settled(self, records: Iterable[Any]) -> SequenceClassification:
        if self.labels and self.problem != "auto":
            return self
        found: set[Label] = set()
        has_lists, has_fractions, widest = False, False, 1
        for record in records:
            values = _listed(record.label)
            found.update(values)
            has_lists |= isinstance(record.label, tuple)
            has_fractions |= any(isinstance(value, float) for value in values)
            widest = max(widest, len(values))
        problem = self.problem
        if problem == "auto":
            problem = "multi" if has_lists else "regression" if has_fractions else "single"
        if self.labels:
            return replace(self, problem=problem)
        if problem == "regression":
            names = ("value",) if widest == 1 else tuple(f"value {n + 1}" for n in range(widest))
            return replace(self, labels=names, problem=problem)
        return replace(self, labels=names_in(found), problem=problem)

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        names = require_names(self.labels, self.name)
        model, missing = load_as(
            "AutoModelForSequenceClassification",
            source,
            dtype=dtype,
            device=device,
            quantize=quantize,
            dense=HEADS,
            problem_type=PROBLEMS.get(self.problem),
            **head_settings(names),
        )
        mark_fresh(source, model, missing)
        _agree_on_padding(source, model)
        return model

    def pieces(
        self, record: Labelled, tokenizer: Any, max_length: int
    ) -> tuple[list[Classified], bool]:
        values = _listed(record.label)
        classes: list[int] = []
        numbers: list[float] = []
        if self.problem == "regression":
            numbers = [_number(value) for value in values]
            if len(numbers) != len(self.labels):
                why = f"there are {len(numbers)} values, and {len(self.labels)} are learned"
                raise Refusal(why, "Give as many on every line")
        else:
            names = require_names(self.labels, self.name)
            classes = sorted({class_of(value, names) for value in values})
            if self.problem != "multi" and isinstance(record.label, tuple):
                why = "the label is a list, where one class is learned"
                raise Refusal(why, "Give one name, or set the task's `problem` to multi")
        ids, segments, is_cut = _tokens(record, tokenizer, max_length)
        return [Classified(ids, segments, classes, numbers)], is_cut

    def spans(self, example: Classified, tokenizer: Any) -> list[Span]:
        names = [self.labels[number] for number in example.classes]
        shown = ", ".join([*names, *(f"{value:g}" for value in example.values)]) or "none"
        return [Span(f"{decoded(example.ids, tokenizer)} → ", False), Span(shown, True)]

    def learned(self, example: Classified) -> int:
        return len(example.values) or (len(self.labels) if self.problem == "multi" else 1)

    def collate(self, examples: Sequence[Classified], pad: int) -> Batch:
        ids = [example.ids for example in examples]
        inputs = {"input_ids": padded(ids, pad), "attention_mask": masked(ids)}
        if any(example.segments for example in examples):
            inputs["token_type_ids"] = padded([e.segments or [0] * len(e) for e in examples], 0)
        return Batch(inputs, {"labels": self._targets(examples)}, sum(map(len, ids)))

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        logits, labels = widened(outputs.logits), batch.labels
        if self.problem == "regression":
            return F.mse_loss(logits, labels.to(logits.dtype), reduction="none").mean(1)
        if self.problem == "multi":
            targets = labels.to(logits.dtype)
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        return F.cross_entropy(logits, labels, reduction="none")

    def count(self, batch: Batch) -> int:
        return batch.rows

    def measures(
        self, model: PeftModel, examples: Sequence[Any], *, pad: int, batch_size: int
    ) -> dict[str, float]:
        """Accuracy and F1; correlations for values."""
        found = gathered(
            self,
            model,
            examples,
            lambda out, _: out.logits.float().cpu(),
            pad=pad,
            batch_size=batch_size,
        )
        logits, true = scores.joined(found), self._targets(list(examples))
        if self.problem == "regression":
            pairs = list(zip(logits.T, true.T, strict=True))
            return {
                name: sum(score(a, b) for a, b in pairs) / len(pairs)
                for name, score in (("pearson", scores.pearson), ("spearman", scores.spearman))
            }
        if self.problem == "multi":
            return _several(logits > 0, true > 0)
        predicted = logits.argmax(1)
        f1 = scores.macro_f1(predicted, true, len(self.labels))
        return {"accuracy": scores.accuracy(predicted, true), "f1": f1}

    def _targets(self, examples: Sequence[Classified]) -> Tensor:
        """Values or hits ``(rows, labels)``, or classes ``(rows,)``."""
        if self.problem == "regression":
            return torch.tensor([example.values for example in examples])
        if self.problem != "multi":
            return torch.tensor([example.classes[0] for example in examples])
        hits = torch.zeros(len(examples), len(self.labels))
        for row, example in enumerate(examples):
            hits[row, example.classes] = 1
        return hits


def head_settings(names: Sequence[str]) -> dict[str, Any]:
    """What of a model's config says that its head tells these classes apart."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "ignore_mismatched_sizes": True,
    }


def _listed(label: Label | tuple[Label, ...]) -> tuple[Label, ...]:
    return label if isinstance(label, tuple) else (label,)


def _number(value: Label) -> float:
    try:
        return float(value)
    except ValueError:
        why = f"the label {value!r} is no number, where values are learned"
        raise Refusal(why, "Give a number, or set the task's `problem` to single") from None


def _tokens(record: Labelled, tokenizer: Any, max_length: int) -> tuple[list[int], list[int], bool]:
    """Token ids, the text that each is of where the tokeniser says it, and whether some are cut."""
    texts = [record.text] if record.other is None else [record.text, record.other]
    coded = tokenizer(*texts, verbose=False)
    is_cut = len(coded["input_ids"]) > max_length
    if is_cut:
        coded = tokenizer(*texts, truncation="longest_first", max_length=max_length)
    if not coded["input_ids"]:
        raise Refusal("the text has no tokens", "Drop the line")
    segments = coded.get("token_type_ids") if record.other is not None else None
    return list(coded["input_ids"]), list(segments or ()), is_cut


def _several(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Measures of hits ``(rows, labels)``."""
    hits, guessed, known = (t.sum(0).double() for t in (predicted & true, predicted, true))
    own = [scores.f1(*map(float, each)) for each in zip(hits, guessed, known, strict=True)]
    return {
        "accuracy": scores.accuracy((predicted == true).all(1), torch.tensor(True)),
        "f1": sum(own) / len(own),
        "f1_micro": scores.f1(float(hits.sum()), float(guessed.sum()), float(known.sum())),
    }


def _agree_on_padding(source: str, model: nn.Module) -> None:
    """Let the model know the token that batches are padded with: decoders look for the last other.

    Without a tokeniser beside it, what the model says itself goes.
    """
    try:
        model.config.pad_token_id = pad_token(load_tokenizer(source))  # type: ignore[union-attr]
    except CheckpointError:
        return


TASKS.register(SequenceClassification.name, SequenceClassification)
