"""Embeddings: texts that belong together lie close, others apart.

With ``s`` the cosine, times ``scale``, between anchor ``i`` and candidate ``j``, a pair's loss is

    -log( exp(s_ii) / Σ_j exp(s_ij) )

whose candidates are all positives and negatives of the same adapter's batch (InfoNCE, also known as
the multiple negatives ranking loss). A scored pair's is ``(cosine - score)²``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multigraft.errors import ConfigError, did_you_mean
from multigraft.model import PeftModel
from multigraft.train import scores
from multigraft.train.batches import Batch, masked, padded
from multigraft.train.encode import Span
from multigraft.train.examples import Example
from multigraft.train.heads import POOLERS
from multigraft.train.load import load_as, refuse_random
from multigraft.train.records import Record, Refusal, Related
from multigraft.train.spelling import decoded
from multigraft.train.tasks.contract import TASKS, Task, widened
from multigraft.train.tasks.forwards import gathered

ANCHOR, POSITIVE, NEGATIVE = range(3)
"""What a row is; rows of an example stand in this order."""


@dataclass(frozen=True)
class RelatedTokens(Example):
    """Token ids of two texts, of a negative if there is one, and a score if it is known."""

    anchor: list[int]
    positive: list[int]
    negative: list[int]
    score: list[float]

    floats: ClassVar[tuple[str, ...]] = ("score",)


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean state of each row's tokens; ``states`` is ``(rows, tokens, size)``."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def first(states: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's first token."""
    return states[:, 0]


def last(states: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's last token."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean, "cls": first, "last": last}


@dataclass(frozen=True)
class Embedding(Task):
    """Pairs and triplets with the negatives of the batch; pairs with a score.

    Args:
        pooling: what stands for a text: ``"mean"`` of its tokens' states, that of the first
            (``"cls"``) or of the ``"last"``.
        scale: of cosines, where negatives compete; the inverse of a temperature.

    Raises:
        ConfigError: a value is outside what its field allows.
    """

    name: ClassVar[str] = "embed"
    task_type: ClassVar[str] = "FEATURE_EXTRACTION"
    call: ClassVar[Mapping[str, Any]] = {}
    records: ClassVar[tuple[type[Record], ...]] = (Related,)
    example: ClassVar[type[Example]] = RelatedTokens
    unit: ClassVar[str] = "pairs"

    pooling: str = "mean"
    scale: float = 20.0

    def __post_init__(self) -> None:
        if self.pooling not in POOLING:
            raise ConfigError(
                f"task `{self.name}`: `pooling` (={self.pooling!r}) must be one of "
                f"{', '.join(POOLING)}.{did_you_mean(str(self.pooling), POOLING)}"
            )
        scale = self.scale
        if type(scale) not in (int, float) or not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"task `{self.name}`: `scale` (={scale!r}) must be above 0.")

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        model, missing = load_as(
            _class_for(source), source, dtype=dtype, device=device, quantize=quantize
        )
        # A pooler comes after the states that are pooled here.
        lacking = [key for key in missing if key.partition(".")[0] not in POOLERS]
        refuse_random(source, lacking)
        return model

    def pieces(
        self, record: Related, tokenizer: Any, max_length: int
    ) -> tuple[list[RelatedTokens], bool]:
        coded: list[list[int]] = []
        is_cut = False
        for text in (record.anchor, record.positive, record.negative):
            ids = [] if text is None else list(tokenizer(text, verbose=False)["input_ids"])
            if text is not None and not ids:
                raise Refusal(f"the text {text!r} has no tokens", "Drop the line")
            if len(ids) > max_length:
                is_cut = True
                ids = list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
            coded.append(ids)
        score = [] if record.score is None else [record.score]
        return [RelatedTokens(coded[0], coded[1], coded[2], score)], is_cut

    def spans(self, example: RelatedTokens, tokenizer: Any) -> list[Span]:
        score = f" ({example.score[0]:g})" if example.score else ""
        found = [
            Span(f"{decoded(example.anchor, tokenizer)}\n", False),
            Span(f"near{score}: {decoded(example.positive, tokenizer)}", True),
        ]
        if example.negative:
            found.append(Span(f"\nfar: {decoded(example.negative, tokenizer)}", False))
        return found

    def learned(self, example: RelatedTokens) -> int:
        return 1

    def collate(self, examples: Sequence[RelatedTokens], pad: int) -> Batch:
        rows: list[list[int]] = []
        kinds: list[int] = []
        known: list[float] = []
        for example in examples:
            own = [ids for ids in (example.anchor, example.positive, example.negative) if ids]
            rows += own
            kinds += range(len(own))
            known += [example.score[0] if example.score else math.nan] * len(own)
        is_first = [number == 0 for number in range(len(rows))]
        targets = {
            "kind": torch.tensor(kinds),
            "score": torch.tensor(known),
            "first": torch.tensor(is_first, dtype=torch.long),
        }
        inputs = {"input_ids": padded(rows, pad), "attention_mask": masked(rows)}
        return Batch(inputs, targets, sum(map(len, rows)))

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        vectors = self.vectors(outputs, batch)
        losses = vectors.new_zeros(batch.rows)
        anchors = batch.targets["kind"] == ANCHOR
        score = batch.targets["score"].to(vectors.dtype)
        scored = (anchors & ~score.isnan()).nonzero().squeeze(1)
        if len(scored):
            cosines = (vectors[scored] * vectors[scored + 1]).sum(1)
            losses = losses.index_add(0, scored, (cosines - score[scored]).square())
        # Joined batches each begin with a first row; negatives are of one's own.
        company = batch.targets["first"].cumsum(0)
        for number in company.unique():
            rows = ((company == number) & score.isnan()).nonzero().squeeze(1)
            own = rows[anchors[rows]]
            if len(own):
                ranked = self._ranked(vectors, batch, own, rows[~anchors[rows]])
                losses = losses.index_add(0, own, ranked)
        return losses

    def vectors(self, outputs: Any, batch: Batch) -> Tensor:
        """The embedding of each row, of length 1, ``(rows, size)``."""
        mask = batch.inputs["attention_mask"]
        states = widened(outputs.last_hidden_state[:, -mask.shape[1] :])
        return F.normalize(POOLING[self.pooling](states, mask), dim=1)

    def _ranked(self, vectors: Tensor, batch: Batch, anchors: Tensor, others: Tensor) -> Tensor:
        """Each anchor's loss among candidates, which are rows by number.

        A candidate that says the same as the positive is no negative, so it is left out.
        """
        logits = self.scale * vectors[anchors] @ vectors[others].T
        right = torch.searchsorted(others, anchors + 1)
        ids = batch.ids
        same = (ids[anchors + 1].unsqueeze(1) == ids[others].unsqueeze(0)).all(2)
        same[torch.arange(len(anchors), device=same.device), right] = False
        return F.cross_entropy(logits.masked_fill(same, -math.inf), right, reduction="none")

    def count(self, batch: Batch) -> int:
        return int((batch.targets["kind"] == ANCHOR).sum())

    def measures(
        self, model: PeftModel, examples: Sequence[Any], *, pad: int, batch_size: int
    ) -> dict[str, float]:
        """How often the positive is the nearest of all; the correlation of cosines with scores."""
        parts = gathered(
            self,
            model,
            examples,
            lambda out, batch: self.vectors(out, batch).float().cpu(),
            pad=pad,
            batch_size=batch_size,
        )
        vectors, targets = scores.joined(parts), self.collate(examples, pad).targets
        anchors = (targets["kind"] == ANCHOR).nonzero().squeeze(1)
        is_scored = ~targets["score"][anchors].isnan()
        found = {}
        if bool(is_scored.any()):
            rows = anchors[is_scored]
            cosines = (vectors[rows] * vectors[rows + 1]).sum(1)
            found["spearman"] = scores.spearman(cosines, targets["score"][rows])
        if not bool(is_scored.all()):
            texts = [ids for e in examples for ids in (e.anchor, e.positive, e.negative) if ids]
            others = (targets["kind"] != ANCHOR) & targets["score"].isnan()
            candidates = others.nonzero().squeeze(1)
            rows = anchors[~is_scored]
            nearest = candidates[(vectors[rows] @ vectors[candidates].T).argmax(1)]
            hits = [texts[n] == texts[a + 1] for n, a in zip(nearest, rows, strict=True)]
            found["accuracy_at_1"] = sum(hits) / len(hits)
        return found


def _class_for(source: str) -> str:
    """The class that loads the encoder: of a model with a decoder too, its encoder alone."""
    import transformers

    from multigraft.train.load import fetch

    config = fetch(source, "config", transformers.AutoConfig.from_pretrained)
    return "AutoModelForTextEncoding" if config.is_encoder_decoder else "AutoModel"


TASKS.register(Embedding.name, Embedding)
