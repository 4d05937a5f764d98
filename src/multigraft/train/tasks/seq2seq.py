"""Sequence to sequence: an encoder reads the source, a decoder writes the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from multigraft.errors import ConfigError
from multigraft.model import PeftModel
from multigraft.train.batches import Batch, masked, padded
from multigraft.train.encode import IGNORED, Span
from multigraft.train.examples import Example
from multigraft.train.load import load_as, refuse_random
from multigraft.train.records import Chat, Pair, Record, Refusal
from multigraft.train.spelling import decoded
from multigraft.train.tasks.contract import TASKS, Task, widened
from multigraft.train.tasks.forwards import each_batch


@dataclass(frozen=True)
class SourceTarget(Example):
    """Token ids of both."""

    ids: list[int]
    target: list[int]


@dataclass(frozen=True)
class SequenceToSequence(Task):
    """The target's next token, given the source; the loss is the mean over the target's tokens.

    Args:
        max_target_length: targets of more tokens are cut; as long as sources where it is None.

    Raises:
        ConfigError: the length is none.
    """

    name: ClassVar[str] = "seq2seq"
    task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    call: ClassVar[Mapping[str, Any]] = {"use_cache": False}
    records: ClassVar[tuple[type[Record], ...]] = (Pair, Chat)
    example: ClassVar[type[Example]] = SourceTarget

    max_target_length: int | None = None

    def __post_init__(self) -> None:
        length = self.max_target_length
        if length is not None and not (type(length) is int and length >= 2):
            raise ConfigError(
                f"task `{self.name}`: `max_target_length` (={length!r}) must be an integer of at "
                "least 2, or left out."
            )

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        model, missing = load_as(
            "AutoModelForSeq2SeqLM", source, dtype=dtype, device=device, quantize=quantize
        )
        refuse_random(source, missing)
        return model

    def pieces(
        self, record: Pair | Chat, tokenizer: Any, max_length: int
    ) -> tuple[list[SourceTarget], bool]:
        pair = record.plain if isinstance(record, Chat) else record
        if pair is None:
            why = "a conversation is not what an encoder and a decoder learn"
            raise Refusal(why, "Give `source` and `target`")
        ids = list(tokenizer(pair.prompt, verbose=False)["input_ids"])
        if not ids:
            raise Refusal("the source has no tokens", "Drop the line")
        target = list(tokenizer(text_target=pair.completion, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and target[-1:] != [end]:
            target.append(end)
        longest = self.max_target_length or max_length
        is_cut = len(ids) > max_length or len(target) > longest
        if len(ids) > max_length:
            coded = tokenizer(pair.prompt, truncation=True, max_length=max_length)
            ids = list(coded["input_ids"])
        return [SourceTarget(ids, target[:longest])], is_cut

    def spans(self, example: SourceTarget, tokenizer: Any) -> list[Span]:
        source, target = (decoded(ids, tokenizer) for ids in (example.ids, example.target))
        return [Span(f"{source}\n", False), Span(target, True)]

    def learned(self, example: SourceTarget) -> int:
        return len(example.target)

    def collate(self, examples: Sequence[SourceTarget], pad: int) -> Batch:
        ids, targets = [e.ids for e in examples], [e.target for e in examples]
        inputs = {"input_ids": padded(ids, pad), "attention_mask": masked(ids)}
        tokens = sum(map(len, (*ids, *targets)))
        return Batch(inputs, {"labels": padded(targets, IGNORED)}, tokens)

    def prepare(self, model: PeftModel, batch: Batch) -> Batch:
        """The batch with what the decoder reads: the target, one place on."""
        shift: Any = model.get_base_model().prepare_decoder_input_ids_from_labels
        inputs = {**batch.inputs, "decoder_input_ids": shift(labels=batch.labels)}
        return Batch(inputs, batch.targets, batch.tokens)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        logits, labels = outputs.logits, batch.labels
        logits = logits[:, -labels.shape[1] :]
        rows, places = (labels >= 0).nonzero(as_tuple=True)
        own = F.cross_entropy(widened(logits[rows, places]), labels[rows, places], reduction="none")
        return own.new_zeros(len(labels)).index_add(0, rows, own)

    def count(self, batch: Batch) -> int:
        return int((batch.labels >= 0).sum())

    def measures(
        self, model: PeftModel, examples: Sequence[Any], *, pad: int, batch_size: int
    ) -> dict[str, float]:
        """The share of tokens that are right after the right ones, and of targets written whole."""

        def run(batch: Batch) -> tuple[int, int, int]:
            known = batch.labels >= 0
            found = model(**batch.inputs, **self.call).logits[:, -batch.labels.shape[1] :].argmax(2)
            right = int(((found == batch.labels) & known).sum())
            return right, int(known.sum()), self._written(model, batch)

        counts = each_batch(self, model, examples, run, pad=pad, batch_size=batch_size)
        right, tokens, whole = (sum(column) for column in zip(*counts, strict=True))
        return {"token_accuracy": right / max(1, tokens), "exact_match": whole / len(examples)}

    def _written(self, model: PeftModel, batch: Batch) -> int:
        """How many rows' targets the model writes, greedily."""
        width = batch.labels.shape[1]
        out = model.generate(
            input_ids=batch.ids,
            attention_mask=batch.inputs["attention_mask"],
            max_new_tokens=width,
            do_sample=False,
            num_beams=1,
        )[:, 1:]
        out = F.pad(out, (0, max(0, width - out.shape[1])), value=-1)[:, :width]
        known = batch.labels >= 0
        return int(((out == batch.labels) | ~known).all(1).sum())


TASKS.register(SequenceToSequence.name, SequenceToSequence)
