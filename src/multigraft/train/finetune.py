"""The whole job on the user's own files: check, load, train, evaluate, save."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from multigraft.config import CONFIG_NAME, PeftConfig
from multigraft.containers import check_name
from multigraft.errors import ConfigError, TrainingError
from multigraft.model import PeftModel
from multigraft.train.dataset import DataSet, Loaded, Split, load_data
from multigraft.train.encode import Encoded, encode_one
from multigraft.train.evaluate import Answer, answer, mean_loss, share_right
from multigraft.train.formats import AUTO
from multigraft.train.lane import Lane
from multigraft.train.load import attach, load_model, load_tokenizer, pad_token
from multigraft.train.log import RunLog
from multigraft.train.loop import OnStep, Progress, train
from multigraft.train.packing import check_packing
from multigraft.train.recipe import Recipe
from multigraft.train.records import BadLine, Chat, Pair, Record
from multigraft.train.store import lengths_of


@dataclass(frozen=True)
class FineTune:
    """One adapter on one base from one file.

    Args:
        model: the base model, a directory or an id on the hub.
        data: a file, a directory or an id on the hub; see `multigraft.train.data`.
        output: directory for the adapter; an adapter of another name than ``default`` goes into a
            subfolder of that name.
        config: what to graft, e.g. a `LoraConfig`.
        recipe: how to train it.
        adapter: its name.
        eval_data: the same, to measure on, before and after.
        eval_split: in its place, the share of the data that is held out; see `Split`.
        format: how the rows are written; ``"auto"`` goes by their keys.
        packing: several examples in a row of ``max_length`` tokens, none of which sees another.
        max_length: longest example in tokens; longer ones are cut.
        on_bad_line: ``"skip"`` leaves lines out that cannot be used, ``"fail"`` stops.
        overwrite: replace an adapter that lies in ``output`` already.
    """

    model: str
    data: str
    output: str
    config: PeftConfig
    recipe: Recipe = field(default_factory=Recipe)
    adapter: str = "default"
    eval_data: str | None = None
    eval_split: float | None = None
    format: str = AUTO
    packing: bool = False
    max_length: int = 1024
    dtype: str = "auto"
    device: str = "auto"
    on_bad_line: str = "fail"
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the adapter's own files go."""
        root = Path(self.output)
        return root if self.adapter == "default" else root / self.adapter

    def prepare(self) -> Prepared:
        """Everything that can fail before training does: files, data, model, targets.

        Raises:
            MultigraftError: whichever of them does not fit; the output is untouched.
        """
        check_name(self.adapter)
        _refuse_to_replace(self.folder, self.overwrite)
        check_output(self.folder)
        data, held_out = self._load_data(tokenizer := load_tokenizer(self.model))
        base = load_model(self.model, dtype=self.dtype, device=self.device)
        longest = max(map(max, (lengths_of(d.examples) for d in (data.train, held_out) if d)))
        _check_lengths(longest, base, self.max_length)
        model = attach(base, self.config, self.adapter, self.recipe.seed)
        pad, pack_to = pad_token(tokenizer), self.max_length if self.packing else 0
        if self.packing:
            check_packing(model, data.train.examples, pad)
        lane = Lane(model, self.adapter, data.train.examples, self.recipe, pad, pack_to)
        measure = Measure(held_out.examples, held_out.records, tokenizer) if held_out else None
        return Prepared(self, model, tokenizer, lane, measure, data.bad, data.cut)

    def _load_data(self, tokenizer: Any) -> tuple[Loaded, DataSet | None]:
        """The data, and what is held out; the bad lines of both are in the first."""
        split = None if self.eval_split is None else Split(self.eval_split, self.recipe.seed)
        if split is not None and self.eval_data is not None:
            raise ConfigError("give `eval_split` or `eval_data`, not both.")
        load = partial(
            load_data,
            tokenizer=tokenizer,
            max_length=self.max_length,
            format=self.format,
            on_bad_line=self.on_bad_line,
        )
        data = load(self.data, split=split)
        if self.eval_data is None:
            return data, data.held_out if split is not None else None
        beside = load(self.eval_data, keep_records=True)
        data.bad += beside.bad
        data.cut += beside.cut
        return data, beside.train


@dataclass
class Measure:
    """A held-out set, and how it is measured."""

    examples: Sequence[Encoded]
    records: list[Record]
    tokenizer: Any

    def loss(self, model: PeftModel) -> float:
        """Mean loss over the learned tokens."""
        return mean_loss(model, self.examples, pad=pad_token(self.tokenizer))

    def answers(self, model: PeftModel) -> list[Answer]:
        """What the model writes for those records that end with something to write."""
        asked = [r for r in self.records if _ends_with_answer(r)]
        if not asked:
            return []
        longest = max(sum(encode_one(r, self.tokenizer).learned) for r in asked)
        return answer(model, self.tokenizer, asked, max_new_tokens=longest + 8)


@dataclass(frozen=True)
class Outcome:
    """What a run came to; the evaluation's parts are None without held-out data.

    Args:
        losses: of every step.
        folder: where the adapter was saved.
        eval_loss: before and after.
        exact_match: before and after, from 0 to 1.
    """

    losses: list[float]
    folder: Path
    eval_loss: tuple[float, float] | None = None
    exact_match: tuple[float, float] | None = None


@dataclass
class Prepared:
    """A run that is ready to go.

    Args:
        bad: lines that are left out.
        cut: how many examples were longer than ``max_length``.
    """

    job: FineTune
    model: PeftModel
    tokenizer: Any
    lane: Lane
    held_out: Measure | None
    bad: Sequence[BadLine]
    cut: int
    is_saved: bool = False

    def __post_init__(self) -> None:
        self.log = RunLog(self.job.folder)

    def run(self, on_step: OnStep | None = None) -> Outcome:
        """Train, save, evaluate.

        Raises:
            TrainingError: training diverged; nothing was saved.
            CheckpointError: the disk refuses the adapter.
        """
        before = self._measure()
        losses = self._train(on_step)
        self.save()
        after = self._measure()
        if before is None or after is None:
            return Outcome(losses, self.job.folder)
        pairs = list(zip(before, after, strict=True))
        return Outcome(losses, self.job.folder, pairs[0], pairs[1])

    def save(self) -> None:
        """Write the adapter as it is now."""
        try:
            self.model.save_pretrained(self.job.output, selected_adapters=[self.job.adapter])
        except Exception:
            self.log.drop()
            raise
        self.is_saved = True
        self.log.keep()

    def rescue(self) -> str:
        """After an interrupt: save what was learned where nothing is replaced; says what is where.

        Raises:
            CheckpointError: the disk refuses the adapter.
        """
        folder, lane = self.job.folder, self.lane
        made = f"{lane.step} of {lane.steps} steps"
        if self.is_saved:
            return f"the adapter is saved in {folder}; only the evaluation is missing"
        if not lane.step:
            self.log.drop()
            return "no step was made, and nothing was saved"
        if (folder / CONFIG_NAME).exists():
            self.log.drop()
            return f"{folder} still holds the older adapter; the {made} that were made are lost"
        self.save()
        return f"the adapter as it was after {made} is saved in {folder}"

    @property
    def base(self) -> nn.Module:
        """The base model."""
        return self.model.get_base_model()

    def _train(self, on_step: OnStep | None) -> list[float]:
        def after(now: Progress) -> None:
            self.log(now)
            if on_step is not None:
                on_step(now)

        try:
            return train(self.model, self.lane, after)
        except Exception:  # not Ctrl-C, after which the adapter may be rescued
            self.log.drop()
            raise

    def _measure(self) -> tuple[float, float] | None:
        if self.held_out is None:
            return None
        return self.held_out.loss(self.model), share_right(self.held_out.answers(self.model))


def _ends_with_answer(record: Record) -> bool:
    if isinstance(record, Chat):
        return record.messages[-1]["role"] == "assistant"
    return isinstance(record, Pair)


def _check_lengths(longest: int, base: nn.Module, max_length: int) -> None:
    """Fail when an example has more tokens than the model has positions for."""
    limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    if limit and longest > limit:
        raise TrainingError(
            f"the longest example has {longest} tokens and the model takes {limit}. Lower "
            f"`max_length` (={max_length}) to that, and longer examples are cut."
        )


def _refuse_to_replace(folder: Path, overwrite: bool) -> None:
    if (folder / CONFIG_NAME).exists() and not overwrite:
        raise TrainingError(
            f"{folder} holds an adapter already. Choose another output directory or adapter name, "
            "or replace it with --overwrite (overwrite=True)."
        )


def check_output(folder: Path) -> None:
    """Find out whether an adapter can be written there; nothing is left behind.

    Raises:
        TrainingError: it cannot.
    """
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        raise TrainingError(f"{nearest} is a file; the output must be a directory.")
    try:
        # Asking for permission is not enough: full and special file systems grant it and refuse.
        with tempfile.NamedTemporaryFile(dir=nearest) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise TrainingError(
            f"{nearest} cannot be written to ({error.strerror}). Choose another output directory."
        ) from error
