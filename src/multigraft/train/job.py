"""A whole job on the user's own files: check, load, train, evaluate, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from multigraft.base_notes import NOTES_NAME
from multigraft.config import PeftConfig
from multigraft.containers import check_name
from multigraft.errors import CheckpointError, ConfigError, TrainingError
from multigraft.kbit import prepare_model_for_kbit_training
from multigraft.model import PeftModel
from multigraft.planning.skeleton import checkpoint_blocks
from multigraft.train.company import LAID, check_strategy, crew_of
from multigraft.train.dataset import DataSet, Loaded, Split, load_data, records_of
from multigraft.train.entrant import Entrant
from multigraft.train.formats import AUTO
from multigraft.train.lane import Lane
from multigraft.train.load import attach, load_tokenizer, pad_token
from multigraft.train.log import LOG_NAME, UNFINISHED
from multigraft.train.outcome import REPORT, Prepared
from multigraft.train.output import check_apart, check_output, check_text, refuse_to_replace
from multigraft.train.packing import check_packing
from multigraft.train.quantised import check_format
from multigraft.train.recipe import Recipe
from multigraft.train.saves import FOLDER, Saves, found_in
from multigraft.train.store import fingerprint_of, lengths_of
from multigraft.train.tasks import Task, described
from multigraft.train.tasks.causal_lm import CausalLM
from multigraft.train.trackers import TRACKERS, Tracking, tensorboard
from multigraft.train.watch import HeldOut, Watch

if TYPE_CHECKING:
    from multigraft.distributed import Ranks


OWN_NAMES = (FOLDER, REPORT, LOG_NAME, UNFINISHED, NOTES_NAME, tensorboard.FOLDER)
"""What a run writes beside adapters' folders; the checkpoints are removed at its end."""


@dataclass(frozen=True)
class AdapterJob:
    """One adapter of a job.

    Args:
        data: a file, a directory or an id on the hub; see `multigraft.train.data`.
        config: what to graft, e.g. a `LoraConfig`.
        recipe: how to train it.
        name: of the adapter; one of another name than ``default`` goes into a subfolder.
        eval_data: the same as ``data``, to measure on.
        eval_split: in its place, the share of the data that is held out; see `Split`.
        watch: when it is measured, and what follows.
        format: how the rows are written; ``"auto"`` goes by their keys.
        packing: several examples in a row of ``max_length`` tokens, none of which sees another.
        max_length: longest example in tokens; longer ones are cut.
        on_bad_line: ``"skip"`` leaves lines out that cannot be used, ``"fail"`` stops.
    """

    data: str
    config: PeftConfig
    recipe: Recipe = field(default_factory=Recipe)
    name: str = "default"
    eval_data: str | None = None
    eval_split: float | None = None
    watch: Watch = field(default_factory=Watch)
    format: str = AUTO
    packing: bool = False
    max_length: int = 1024
    on_bad_line: str = "fail"

    def check(self) -> None:
        """Fail when it cannot be read from anything, or is to be measured on nothing.

        Raises:
            ConfigError: it cannot, or is.
        """
        for source in self.sources:
            check_text("data", source)
        is_measured = self.eval_data is not None or self.eval_split is not None
        if not is_measured and self.watch.needs_held_out:
            raise ConfigError(
                f"adapter `{self.name}`: `eval_every`, `patience` and `measure` say how held-out "
                "examples are used, and there are none. Give `eval_data` or `eval_split`."
            )

    @property
    def sources(self) -> list[str]:
        """Everything that is read."""
        return [self.data] if self.eval_data is None else [self.data, self.eval_data]

    def load_data(self, tokenizer: Any, task: Task) -> tuple[Loaded, DataSet | None]:
        """The data, and what is held out; the bad lines of both are in the first.

        Raises:
            ConfigError: two ways of holding examples out are named.
            DataError: a source cannot be read, or holds nothing to use.
        """
        split = None if self.eval_split is None else Split(self.eval_split, self.recipe.seed)
        if split is not None and self.eval_data is not None:
            raise ConfigError("give `eval_split` or `eval_data`, not both.")
        load = partial(
            load_data,
            tokenizer=tokenizer,
            max_length=self.max_length,
            format=self.format,
            on_bad_line=self.on_bad_line,
            task=task,
        )
        data = load(self.data, split=split)
        if self.eval_data is None:
            return data, data.held_out if split is not None else None
        beside = load(self.eval_data, keep_records=True)
        data.bad += beside.bad
        data.cut += beside.cut
        return data, beside.train


@dataclass(frozen=True)
class Job:
    """Adapters on one base, each from its own data, all in one run.

    Args:
        model: the base model, a directory or an id on the hub.
        output: directory for the adapters, their logs and the run's checkpoints.
        adapters: at least one, with different names.
        task: what they learn.
        dtype, device, quantize: of the base; see `multigraft.train.load_model`.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        save_every: rounds between two checkpoints; 0 writes none.
        keep: how many checkpoints are kept while the run lasts.
        overwrite: replace adapters that lie in ``output`` already.
        resume: go on from the last checkpoint in ``output``.
        log_to: trackers that get the curves besides the logs, by name.
        strategy: how several processes share the run: ``"ddp"``, the whole base and some rows on
            each; ``"fsdp"``, parts of the base that are put together layer by layer; ``"tp"``,
            parts of every layer and all rows on each.
        report: whether a page on the adapters and their curves is written at the end.
    """

    model: str
    output: str
    adapters: Sequence[AdapterJob]
    task: Task = field(default_factory=CausalLM)
    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    gradient_checkpointing: bool = False
    save_every: int = 500
    keep: int = 2
    overwrite: bool = False
    resume: bool = False
    log_to: Sequence[str] = ()
    strategy: str = "ddp"
    report: bool = False

    def folder(self, name: str) -> Path:
        """Where an adapter's own files go."""
        root = Path(self.output)
        return root if name == "default" else root / name

    def prepare(self, ranks: Ranks | None = None) -> Prepared:
        """Everything that can fail before training does: files, data, model, targets.

        Args:
            ranks: this process among several, see `multigraft.distributed.together`; all of them
                call.

        Raises:
            MultigraftError: whichever of them does not fit; the output is untouched.
        """
        self._check()
        if self.quantize is not None:
            check_format(self.quantize)
        for name in self.log_to:
            TRACKERS[name]  # an unknown one is told before anything is read
        folders = [self.folder(adapter.name) for adapter in self.adapters]
        is_restart = ranks is not None and ranks.restarts > 0
        resumes = self.resume or (is_restart and bool(found_in(Path(self.output) / FOLDER)))
        if not (resumes or is_restart):
            refuse_to_replace(folders, Path(self.output), self.overwrite)
        for folder in folders:
            check_output(folder)
        tokenizer = load_tokenizer(self.model)
        task = self.task.settled(self._records(self.task))
        data = [adapter.load_data(tokenizer, task) for adapter in self.adapters]
        base = self._load(task, ranks)
        for adapter, (own, held_out) in zip(self.adapters, data, strict=True):
            _check_lengths(own.train, held_out, base, adapter.max_length)
        model = self._attach(base, task)
        crew = crew_of(model, ranks, self.strategy)
        entrants = [
            self._entrant(adapter, model, tokenizer, task, own.train, held_out)
            for adapter, (own, held_out) in zip(self.adapters, data, strict=True)
        ]
        bad = [line for own, _ in data for line in own.bad]
        cut = sum(own.cut for own, _ in data)
        saves = Saves(Path(self.output), self._asked(entrants), self.save_every, self.keep)
        found = self._found(saves) if resumes else None
        tracking = Tracking(self.log_to if crew.is_main else (), Path(self.output), saves.asked)
        return Prepared(self, model, tokenizer, entrants, saves, tracking, bad, cut, found, crew)

    def _load(self, task: Task, ranks: Ranks | None) -> nn.Module:
        if ranks is None or ranks.size == 1:
            device = self.device
        elif self.strategy in LAID:
            return LAID[self.strategy](self.model, task, self.dtype, ranks, self.quantize)
        else:
            device = str(ranks.device)
        return task.load(self.model, dtype=self.dtype, device=device, quantize=self.quantize)

    def _records(self, task: Task) -> Iterator[Any]:
        for adapter in self.adapters:
            yield from records_of(adapter.sources, task, adapter.format)

    def _attach(self, base: nn.Module, task: Task) -> PeftModel:
        if self.quantize is not None:
            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        if self.gradient_checkpointing:
            checkpoint_blocks(base)
        grown: nn.Module = base
        for adapter in self.adapters:
            seed, kind = adapter.recipe.seed, task.task_type
            grown = attach(grown, adapter.config, adapter.name, seed, task_type=kind)
        assert isinstance(grown, PeftModel)  # there is at least one adapter
        return grown

    def _entrant(
        self,
        adapter: AdapterJob,
        model: PeftModel,
        tokenizer: Any,
        task: Task,
        train: DataSet,
        held_out: DataSet | None,
    ) -> Entrant:
        pad, pack_to = pad_token(tokenizer), adapter.max_length if adapter.packing else 0
        if adapter.packing:
            if not task.packs:
                raise ConfigError(
                    f"`packing`: examples of the task {task.name} each need a row of their own. "
                    "Leave it out; `group_by_length` saves padding."
                )
            check_packing(model, train.examples, pad)
        recipe = adapter.recipe
        lane = Lane(model, adapter.name, train.examples, recipe, pad, pack_to, task)
        measure = None
        if held_out is not None:
            measure = HeldOut(task, held_out.examples, tokenizer, held_out.records)
        return Entrant(lane, measure, adapter.watch)

    def _asked(self, entrants: Sequence[Entrant]) -> dict[str, Any]:
        """What every step follows from, as JSON holds it."""
        task = _plain(described(entrants[0].lane.task))
        adapters = {}
        for adapter, entrant in zip(self.adapters, entrants, strict=True):
            examples = entrant.lane.examples
            adapters[adapter.name] = {
                "data": {"examples": len(examples), "content": fingerprint_of(examples)},
                "config": _plain(adapter.config.to_dict()),
                "recipe": _plain(dataclasses.asdict(adapter.recipe)),
                "watch": dataclasses.asdict(adapter.watch),
                "packing": adapter.packing,
                "max_length": adapter.max_length,
            }
        return {"task": task, "quantize": self.quantize, "adapters": adapters}

    def _found(self, saves: Saves) -> Any:
        found = saves.latest()
        if found is None:
            raise CheckpointError(
                f"{self.output}: there is no checkpoint to resume from. Start without --resume "
                "(resume=False); `save_every` says how often one is written."
            )
        return found

    def _check(self) -> None:
        if not self.adapters:
            raise ConfigError("`adapters`: a run needs at least one.")
        names = [check_name(adapter.name) for adapter in self.adapters]
        own = next((name for name in names if name.lower() in OWN_NAMES), None)
        if own is not None:
            raise ConfigError(
                f"`adapters`: the name {own!r} is that of files of the run's own, which lie beside "
                "the adapters. Choose another one."
            )
        check_apart(names)
        check_text("model", self.model)
        check_text("output", self.output)
        for adapter in self.adapters:
            adapter.check()
        check_strategy(self.strategy, [adapter.config for adapter in self.adapters])
        if self.save_every < 0 or self.keep < 1:
            raise ConfigError(
                f"`save_every` (={self.save_every}) must be at least 0 and `keep` (={self.keep}) "
                "at least 1."
            )


def _check_lengths(
    train: DataSet, held_out: DataSet | None, base: nn.Module, max_length: int
) -> None:
    """Fail when an example has more tokens than the model has positions for."""
    longest = max(max(lengths_of(d.examples)) for d in (train, held_out) if d is not None)
    limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    if limit and longest > limit:
        raise TrainingError(
            f"the longest example has {longest} tokens and the model takes {limit}. Lower "
            f"`max_length` (={max_length}) to that, and longer examples are cut."
        )


def _plain(value: Any) -> Any:
    """A value as JSON holds it: sets in order, and whatever else it knows not as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
