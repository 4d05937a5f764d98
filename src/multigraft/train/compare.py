"""Several adapters and their base on the same data: what each loses, and what each answers.

Rows of all of them share forwards, as far as their methods allow: each batch stands there once for
each, under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from multigraft.errors import ConfigError
from multigraft.train.batches import Batch, join
from multigraft.train.encode import expected_text, prompt_ids
from multigraft.train.load import pad_token
from multigraft.train.records import Chat, Pair, Record
from multigraft.train.tasks import Task

if TYPE_CHECKING:
    from multigraft.generation import Ensemble


@dataclass(frozen=True)
class Score:
    """How one speaker did.

    Args:
        speaker: an adapter's name, or ``"__base__"``.
        loss: the mean over what the task counts: learned tokens, examples or pairs.
        perplexity: of texts, e to the loss.
        exact_match: the share of answers that are the expected ones but for white space around
            them; None where nothing is to be answered, or it was not asked for.
        measures: further ones of the task, by name.
    """

    speaker: str
    loss: float
    perplexity: float | None
    exact_match: float | None
    measures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def compare(
    ensemble: Ensemble,
    examples: Sequence[Any],
    records: Sequence[Record],
    speakers: Sequence[str],
    task: Task,
    *,
    batch_size: int = 16,
    with_answers: bool = True,
    max_new_tokens: int = 128,
) -> list[Score]:
    """Score speakers on encoded examples, and on what they answer to the records.

    Args:
        speakers: names of adapters; ``"__base__"`` for the base alone.
        batch_size: rows at once, of all speakers together.
        with_answers: let them write, which takes most of the time.
        max_new_tokens: where an answer that does not end is cut.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: a number is none that it can be.
    """
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise ConfigError(f"`{name}` (={number}) must be at least 1.")
    speakers = ensemble.require(speakers)
    losses = mean_losses(ensemble, examples, speakers, task, batch_size)
    exact: dict[str, float] = {}
    writes = task.generates and not getattr(ensemble.model.config, "is_encoder_decoder", False)
    if with_answers and writes:
        exact = exact_matches(ensemble, records, speakers, batch_size, max_new_tokens)
    return [
        Score(
            name,
            losses[name],
            _exp(losses[name]) if task.generates else None,
            exact.get(name),
            _measures(ensemble, examples, name, task, batch_size),
        )
        for name in speakers
    ]


@torch.inference_mode()
def mean_losses(
    ensemble: Ensemble,
    examples: Sequence[Any],
    speakers: Sequence[str],
    task: Task,
    batch_size: int,
) -> dict[str, float]:
    """The mean loss of each speaker over all examples."""
    pad, model = pad_token(ensemble.common_tokenizer), ensemble.model
    totals = dict.fromkeys(speakers, 0.0)
    counts = dict.fromkeys(speakers, 0)
    model.eval()
    for company in ensemble.companies(speakers):
        each = max(1, batch_size // len(company))
        for start in range(0, len(examples), each):
            batch = task.collate(examples[start : start + each], pad).to(ensemble.device)
            batch = task.prepare(model, batch)
            for name, total in _losses(ensemble, company, batch, task, pad).items():
                totals[name] += total
                counts[name] += task.count(batch)
    return {name: totals[name] / max(1, counts[name]) for name in speakers}


def exact_matches(
    ensemble: Ensemble,
    records: Sequence[Record],
    speakers: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """The share of each speaker's answers that are right; empty where nothing is to be answered."""
    from multigraft.generation import Sampling
    from multigraft.generation.write import Row, write_rows

    asked = [record for record in records if isinstance(record, Pair | Chat)]
    if not asked:
        return {}
    prompts = [prompt_ids(record, ensemble.common_tokenizer) for record in asked]
    most = ensemble.longest
    fits = [n for n, ids in enumerate(prompts) if ids and (most is None or len(ids) < most)]
    fits.sort(key=lambda n: len(prompts[n]))  # rows of like length share batches
    rows = [Row(n, prompts[n], name) for n in fits for name in speakers]
    right = dict.fromkeys(speakers, 0)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        sampling = Sampling(max_new_tokens)
        for answer in write_rows(ensemble, part, sampling, batch_size=batch_size):
            wanted = expected_text(asked[answer.prompt]).strip()
            right[answer.speaker] += answer.text.strip() == wanted
    return {name: right[name] / len(asked) for name in speakers}


def _losses(
    ensemble: Ensemble, company: Sequence[str], batch: Batch, task: Task, pad: int
) -> dict[str, float]:
    """The sum of a batch's losses for each of those who share it."""
    if len(company) == 1:
        with ensemble.alone(company[0]):
            outputs = ensemble.model(**batch.inputs, **task.call)
        return {company[0]: float(task.losses(outputs, batch).sum())}
    joined = join([batch] * len(company), pad)
    names = [name for name in company for _ in range(batch.rows)]
    outputs = ensemble.model(**joined.inputs, **task.call, adapter_names=names)
    sums = task.losses(outputs, joined).reshape(len(company), -1).sum(1).tolist()
    return dict(zip(company, sums, strict=True))


def _measures(
    ensemble: Ensemble, examples: Sequence[Any], speaker: str, task: Task, batch_size: int
) -> dict[str, float]:
    pad = pad_token(ensemble.common_tokenizer)
    with ensemble.alone(speaker):
        return task.measures(ensemble.model, examples, pad=pad, batch_size=batch_size)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
