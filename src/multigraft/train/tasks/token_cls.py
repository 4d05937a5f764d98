"""Token classification: a tag for every word, learned at the word's first token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from multigraft.model import PeftModel
from multigraft.train import scores
from multigraft.train.batches import Batch, masked, padded
from multigraft.train.encode import IGNORED, Span
from multigraft.train.examples import Example
from multigraft.train.heads import HEADS, mark_fresh
from multigraft.train.labels import check_names, class_of, names_in, require_names
from multigraft.train.load import load_as
from multigraft.train.records import Record, Refusal, Tagged
from multigraft.train.spelling import decoded
from multigraft.train.tasks.contract import TASKS, Task, widened
from multigraft.train.tasks.forwards import gathered
from multigraft.train.tasks.seq_cls import head_settings


@dataclass(frozen=True)
class TaggedTokens(Example):
    """Token ids, and for each the number of its tag, `IGNORED` within words and beside them."""

    ids: list[int]
    tags: list[int]


@dataclass(frozen=True)
class TokenClassification(Task):
    """One tag a word.

    Args:
        labels: names of the tags, in the order of the head's outputs; found in the data where none
            are given.

    Raises:
        ConfigError: the labels are no names.
    """

    name: ClassVar[str] = "token-cls"
    task_type: ClassVar[str] = "TOKEN_CLS"
    records: ClassVar[tuple[type[Record], ...]] = (Tagged,)
    example: ClassVar[type[Example]] = TaggedTokens
    unit: ClassVar[str] = "tags"

    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.labels, self.name)

    def settled(self, records: Iterable[Any]) -> TokenClassification:
        if self.labels:
            return self
        found = {tag for record in records for tag in record.tags}
        return replace(self, labels=names_in(found))

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        model, missing = load_as(
            "AutoModelForTokenClassification",
            source,
            dtype=dtype,
            device=device,
            quantize=quantize,
            dense=HEADS,
            **head_settings(require_names(self.labels, self.name)),
        )
        mark_fresh(source, model, missing)
        return model

    def pieces(
        self, record: Tagged, tokenizer: Any, max_length: int
    ) -> tuple[list[TaggedTokens], bool]:
        names = require_names(self.labels, self.name)
        classes = [class_of(tag, names) for tag in record.tags]
        ids, words = aligned(record.words, tokenizer)
        if len(ids) > max_length:
            text = " ".join(record.words)
            kept = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            # A token that closes the text takes the place of the last one that fits.
            words = [w if i == j else None for i, j, w in zip(kept, ids, words, strict=False)]
            is_cut, ids = True, list(kept)
        else:
            is_cut = False
        tags = [IGNORED if word is None else classes[word] for word in words]
        if all(tag == IGNORED for tag in tags):
            raise Refusal("no word has a token within `max_length`", "Raise the length")
        return [TaggedTokens(ids, tags)], is_cut

    def spans(self, example: TaggedTokens, tokenizer: Any) -> list[Span]:
        starts = [at for at, tag in enumerate(example.tags) if tag != IGNORED]
        found = [Span(decoded(example.ids[: starts[0]], tokenizer), False)]
        for start, end in zip(starts, [*starts[1:], len(example.ids)], strict=True):
            word = decoded(example.ids[start:end], tokenizer).strip()
            tag = self.labels[example.tags[start]]
            found += [Span(f" {word} ", False), Span(f"/{tag}", True)]
        return found

    def learned(self, example: TaggedTokens) -> int:
        return sum(tag != IGNORED for tag in example.tags)

    def collate(self, examples: Sequence[TaggedTokens], pad: int) -> Batch:
        ids = [example.ids for example in examples]
        labels = padded([example.tags for example in examples], IGNORED)
        inputs = {"input_ids": padded(ids, pad), "attention_mask": masked(ids)}
        return Batch(inputs, {"labels": labels}, sum(map(len, ids)))

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        logits = widened(outputs.logits[:, -batch.width :]).transpose(1, 2)
        losses = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="none")
        return losses.sum(1)

    def count(self, batch: Batch) -> int:
        return int((batch.labels != IGNORED).sum())

    def measures(
        self, model: PeftModel, examples: Sequence[Any], *, pad: int, batch_size: int
    ) -> dict[str, float]:
        """Accuracy and F1 over words; the F1 of whole entities where the tags mark such."""

        def take(outputs: Any, batch: Batch) -> list[list[int]]:
            found = outputs.logits[:, -batch.width :].argmax(-1)
            return [row[keep].tolist() for row, keep in zip(found, batch.labels >= 0, strict=True)]

        parts = gathered(self, model, examples, take, pad=pad, batch_size=batch_size)
        predicted = [row for part in parts for row in part]
        true = [[tag for tag in example.tags if tag != IGNORED] for example in examples]
        flat, known = (Tensor([tag for row in rows for tag in row]) for rows in (predicted, true))
        found = {
            "accuracy": scores.accuracy(flat, known),
            "f1": scores.macro_f1(flat, known, len(self.labels)),
        }
        if scores.is_bio(self.labels):
            rows = zip(map(self._names, predicted), map(self._names, true), strict=True)
            found["entity_f1"] = scores.entity_f1(rows)
        return found

    def _names(self, classes: Sequence[int]) -> list[str]:
        return [self.labels[number] for number in classes]


def aligned(words: Sequence[str], tokenizer: Any) -> tuple[list[int], list[int | None]]:
    """Token ids of words with spaces between, and at each word's first token its number.

    So they are tokenised as the running text is that a model will see in use.

    Raises:
        Refusal: the tokeniser does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        why = f"the tokeniser ({type(tokenizer).__name__}) does not say where its tokens stand"
        raise Refusal(why, "Use the fast one of the model")
    starts, position = [], 0
    for word in words:
        starts.append(position)
        position += len(word) + 1
    coded = tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)
    firsts: list[int | None] = []
    following = 0
    for begin, end in coded["offset_mapping"]:
        firsts.append(None)
        if begin < end and following < len(words) and end > starts[following]:
            firsts[-1] = following
            while following < len(words) and starts[following] < end:
                following += 1
    return list(coded["input_ids"]), firsts


TASKS.register(TokenClassification.name, TokenClassification)
