"""Answers of several speakers to several prompts: a row each, in batches that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multigraft.errors import ConfigError
from multigraft.generation.ensemble import Ensemble
from multigraft.generation.prompts import Prompt
from multigraft.generation.sampling import Draws, Sampling
from multigraft.train import pad_token
from multigraft.train.evaluate import left_padded

OnText = Callable[[int, str], None]
"""Told a row's number and what was added to its text."""
UNFINISHED = "\ufffd"
"""What a tokeniser gives for half a character."""


@dataclass(frozen=True)
class Written:
    """One answer.

    Args:
        prompt: the question's number.
        speaker: an adapter's name, or ``"__base__"``.
        tokens: how many were written, the one that ends the answer included.
        is_finished: whether the model ended it, rather than the limit.
    """

    prompt: int
    speaker: str
    text: str
    tokens: int
    is_finished: bool


@dataclass(frozen=True)
class Row:
    """What one row of a batch is: a question's number, its tokens, and who answers it."""

    prompt: int
    ids: list[int]
    speaker: str


def write(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    speakers: Sequence[str],
    sampling: Sampling,
    *,
    raw: bool = False,
    batch_size: int = 16,
    on_text: OnText | None = None,
    first: int = 0,
) -> Iterator[Written]:
    """Every speaker's answer to every prompt, prompt by prompt, as batches are done.

    Args:
        speakers: names of adapters; ``"__base__"`` for the base alone.
        raw: the prompts' text as it stands, without the chat template.
        batch_size: rows at once; speakers share them as far as their methods allow.
        on_text: is told what each row adds, as it is written; rows are numbered from 0 in the order
            of the results.
        first: the number of the first prompt, from which its random numbers follow.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: a prompt has no room for an answer.
        DataError: the chat template refuses a prompt.
    """
    speakers = ensemble.require(speakers)
    each = max(1, batch_size // max(1, len(speakers)))
    for start in range(0, len(prompts), each):
        rows = [
            Row(
                first + start + number, prompt.ids(ensemble.tokenizer_of(speaker), raw=raw), speaker
            )
            for number, prompt in enumerate(prompts[start : start + each])
            for speaker in speakers
        ]
        before = start * len(speakers)
        tell = None if on_text is None else _renumbered(on_text, range(before, before + len(rows)))
        yield from write_rows(ensemble, rows, sampling, batch_size=batch_size, on_text=tell)


def write_rows(
    ensemble: Ensemble,
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    batch_size: int = 16,
    on_text: OnText | None = None,
) -> list[Written]:
    """The rows' answers in their order; see `write`.

    Raises:
        ConfigError: a row has no room for an answer.
    """
    companies = ensemble.companies(list(dict.fromkeys(row.speaker for row in rows)))
    company_of = {name: n for n, company in enumerate(companies) for name in company}
    together: dict[tuple[int, int, frozenset[int]], list[int]] = {}
    for n, row in enumerate(rows):  # what ends one, the model's last position too, must not end all
        limit = _limit(ensemble, row, sampling)
        ends = frozenset(_ends(ensemble, row.speaker))
        together.setdefault((company_of[row.speaker], limit, ends), []).append(n)
    found: dict[int, Written] = {}
    for (_, limit, _), places in together.items():
        for at in range(0, len(places), batch_size):
            part = places[at : at + batch_size]
            tell = None if on_text is None else _renumbered(on_text, part)
            own = replace(sampling, max_new_tokens=limit)
            written = _batch(ensemble, [rows[n] for n in part], own, tell)
            found |= zip(part, written, strict=True)
    return [found[n] for n in range(len(rows))]


def _renumbered(on_text: OnText, places: Sequence[int]) -> OnText:
    return lambda row, text: on_text(places[row], text)


def _batch(
    ensemble: Ensemble, rows: Sequence[Row], sampling: Sampling, on_text: OnText | None
) -> list[Written]:
    """The rows' answers, in their order."""
    names = [row.speaker for row in rows]
    is_alone = len(set(names)) == 1
    with ensemble.alone(names[0]) if is_alone else nullcontext():
        out = _generate(ensemble, rows, None if is_alone else names, sampling, on_text)
    ends = _ends(ensemble, names[0])
    written = []
    for row, ids in zip(rows, out, strict=True):
        end = next((n for n, token in enumerate(ids) if token in ends), None)
        own = ids if end is None else ids[:end]
        text = ensemble.tokenizer_of(row.speaker).decode(own, skip_special_tokens=True)
        count = len(own) + (end is not None)
        written.append(Written(row.prompt, row.speaker, text, count, end is not None))
    return written


def _generate(
    ensemble: Ensemble,
    rows: Sequence[Row],
    names: Sequence[str] | None,
    sampling: Sampling,
    on_text: OnText | None,
) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList

    pad, ends = pad_token(ensemble.tokenizer), _ends(ensemble, rows[0].speaker)
    ids, mask = left_padded([row.ids for row in rows], pad)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    more: dict[str, Any] = {} if names is None else {"adapter_names": list(names)}
    if on_text is not None:
        tokenizers = [ensemble.tokenizer_of(row.speaker) for row in rows]
        more["streamer"] = Stream(tokenizers, ends, on_text)
    with torch.inference_mode():
        out: Tensor = ensemble.model.generate(
            input_ids=ids.to(ensemble.device),
            attention_mask=mask.to(ensemble.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([Draws(sampling, [row.prompt for row in rows])]),
            **more,
        )
    found: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return found


def _ends(ensemble: Ensemble, speaker: str) -> set[int]:
    """Tokens that end an answer, by the model's own settings or the speaker's tokeniser."""
    own = getattr(ensemble.model.get_base_model(), "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    own_end = ensemble.tokenizer_of(speaker).eos_token_id
    return {int(token) for token in (*found, own_end) if token is not None}


def _limit(ensemble: Ensemble, row: Row, sampling: Sampling) -> int:
    """How many tokens may be written for a row.

    Raises:
        ConfigError: none, since it is empty, or fills the model already.
    """
    most, count = ensemble.longest, len(row.ids)
    if not count:
        raise ConfigError(f"prompt {row.prompt + 1} is empty: it has no tokens. Write something.")
    if most is not None and count >= most:
        raise ConfigError(
            f"prompt {row.prompt + 1} has {count:,} tokens; the model takes {most:,} with the "
            "answer. Shorten it, or begin the conversation anew."
        )
    return sampling.max_new_tokens if most is None else min(sampling.max_new_tokens, most - count)


class Stream:
    """What transformers' `generate` tells of the tokens of each step, as text row by row."""

    def __init__(self, tokenizers: Sequence[Any], ends: set[int], on_text: OnText) -> None:
        rows = len(tokenizers)
        self.tokenizers = tokenizers
        self.ends = ends
        self.on_text = on_text
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.said = [""] * rows
        self.is_over = [False] * rows
        self.has_begun = False

    def put(self, tokens: Tensor) -> None:
        """The prompts first, then the next token of each row."""
        if not self.has_begun:
            self.has_begun = True
            return
        for row, token in enumerate(tokens.flatten().tolist()):
            if self.is_over[row]:
                continue
            self.is_over[row] = token in self.ends
            if not self.is_over[row]:
                self.ids[row].append(token)
            self._tell(row, is_last=self.is_over[row])

    def end(self) -> None:
        """Whatever is left of the rows that did not end by themselves."""
        for row, is_over in enumerate(self.is_over):
            if not is_over:
                self._tell(row, is_last=True)

    def _tell(self, row: int, *, is_last: bool) -> None:
        text = self.tokenizers[row].decode(self.ids[row], skip_special_tokens=True)
        if text.endswith(UNFINISHED) and not is_last:
            return  # the rest of the character comes with the next token
        fresh = text[len(self.said[row]) :]
        if fresh:
            self.said[row] = text
            self.on_text(row, fresh)
