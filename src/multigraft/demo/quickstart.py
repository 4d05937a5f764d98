"""The quick start as a job in stages: three adapters on one small base, and what is promised.

Each stage is a method that returns what it found; whoever runs the job prints it. The promises at
the end are checked against the model itself, and one that does not hold is said to be broken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multigraft import train as training
from multigraft.atomic import write_files, write_utf8
from multigraft.demo import RECIPE, TASKS, Example, Recipe, Task, examples, model_path
from multigraft.inspection import Structure, inspect
from multigraft.model import PeftModel
from multigraft.routing import BASE as BASE
from multigraft.train.quantised import check_format

ABOVE = 0.90
"""Exact match that each adapter has to exceed on its own task."""
BELOW = 0.05
"""Exact match that the base must not exceed on any task."""
TRAIN_SEED, HELD_OUT_SEED = 0, 1
ROWS_EACH = 2
"""Rows of each adapter in the mixed batch that is shown."""


@dataclass(frozen=True)
class Scores:
    """Exact match by (adapter, task), ``"__base__"`` being the base alone."""

    table: dict[tuple[str, str], float]
    held_out: int

    def row(self, adapter: str, tasks: Sequence[Task]) -> list[float]:
        """One adapter's scores, in the order of ``tasks``."""
        return [self.table[adapter, task.name] for task in tasks]


@dataclass(frozen=True)
class Row:
    """A row of the mixed batch: the adapter that it names, and what came of it."""

    adapter: str
    task: str
    text: str
    given: str
    expected: str

    @property
    def is_right(self) -> bool:
        """Whether this is the task's answer."""
        return self.given.strip() == self.expected.strip()


@dataclass(frozen=True)
class Reload:
    """What a fresh base with the saved adapters gives, against the trained model."""

    folders: tuple[Path, ...]
    max_difference: float
    rows: int


@dataclass(frozen=True)
class Promise:
    """A claim, whether it holds, and the figures."""

    claim: str
    is_kept: bool
    figures: str


class Quickstart:
    """The demo's job; call the stages in the order in which they are written here.

    Args:
        output: directory for the three adapters, a subfolder each, and for what is asked of
            ``multigraft train``: a run's file and its data.
        seed: decides initial values, order and dropout.
        recipe: settings of every adapter.
        base: folder of the base model; the package's own by default.
        quantize: format in which the base's linear layers are kept (QLoRA), or None.

    Raises:
        ConfigError: there is no such format.
        TrainingError: the output cannot be written to.
    """

    def __init__(
        self,
        output: str | Path,
        seed: int = 0,
        recipe: Recipe = RECIPE,
        base: str | Path | None = None,
        tasks: Sequence[Task] = TASKS,
        quantize: str | None = None,
    ) -> None:
        self.output = Path(output)
        training.check_output(self.output)
        if quantize is not None:
            check_format(quantize)
        self.seed = seed
        self.recipe = recipe
        self.base = str(base or model_path())
        self.tasks = tuple(tasks)
        self.quantize = quantize
        self.scores: Scores | None = None
        self.reloaded: Reload | None = None

    @cached_property
    def run_file(self) -> Path:
        """What is asked of ``multigraft train``: a file of three adapters, and their data."""
        import yaml

        data = {task.name: self.output / "data" / f"{task.name}.jsonl" for task in self.tasks}
        rows = self.recipe.steps * self.recipe.batch
        texts = {
            path: "".join(_line(each) for each in examples(task, "train", rows, TRAIN_SEED))
            for task, path in zip(self.tasks, data.values(), strict=True)
        }
        run = {
            "model": self.base,
            "output": str(self.output),
            "dtype": self.recipe.dtype,
            "device": "cpu",
            **({"quantize": self.quantize} if self.quantize else {}),
            "rank": self.recipe.rank,
            "alpha": float(self.recipe.alpha),
            "target_modules": self.recipe.targets,
            "steps": self.recipe.steps,
            "batch_size": self.recipe.batch,
            "lr": self.recipe.learning_rate,
            "warmup": float(self.recipe.warmup_steps),
            "weight_decay": self.recipe.weight_decay,
            "clip": self.recipe.clip_norm,
            "seed": self.seed,
            "overwrite": True,
            "report": False,
            "adapters": [{"name": name, "data": str(path)} for name, path in data.items()],
        }
        texts[self.output / "run.yaml"] = yaml.safe_dump(run, sort_keys=False)
        write_files({path: partial(write_utf8, text=text) for path, text in texts.items()})
        return self.output / "run.yaml"

    @cached_property
    def ready(self) -> training.Prepared:
        """The run: the base with one new adapter per task, all of them over every linear layer."""
        from multigraft.train.spec import job_of, read_run

        return job_of(read_run(self.run_file)).prepare()

    @property
    def tokenizer(self) -> Any:
        """The base model's tokeniser."""
        return self.ready.tokenizer

    @property
    def model(self) -> PeftModel:
        """The base with its adapters."""
        return self.ready.model

    def train(self, on_event: training.OnEvent | None = None) -> list[training.Outcome]:
        """Train all adapters in one run, and save each when it is done."""
        return self.ready.run(on_event)

    def structure(self) -> Structure:
        """What hangs where: the base, its sites, the adapters at each."""
        return inspect(self.model)

    def evaluate(self, task: Task) -> dict[str, float]:
        """Exact match of the base and of every adapter on one task's held-out examples.

        All of them share batches: each row names the adapter that it wants.
        """
        records = training.pairs(examples(task, "heldout", self.recipe.heldout, HELD_OUT_SEED))
        adapters = [BASE, *(t.name for t in self.tasks)]
        answers = training.answer(
            self.model,
            self.tokenizer,
            [record for _ in adapters for record in records],
            adapter_names=[name for name in adapters for _ in records],
            max_new_tokens=self.recipe.max_new_tokens,
            batch_size=len(adapters) * len(records),
        )
        count = len(records)
        found = {
            name: training.share_right(answers[n * count : (n + 1) * count])
            for n, name in enumerate(adapters)
        }
        before = self.scores.table if self.scores else {}
        table = before | {(name, task.name): share for name, share in found.items()}
        self.scores = Scores(table, count)
        return found

    def mixed_batch(self) -> list[Row]:
        """One batch in which each row uses its own adapter, the last one none."""
        rows = self._mixed_rows()
        answers = training.answer(
            self.model,
            self.tokenizer,
            [record for _, _, record in rows],
            adapter_names=[name for name, _, _ in rows],
            max_new_tokens=self.recipe.max_new_tokens,
        )
        return [
            Row(name, task.name, _input_of(task, record.prompt), a.given, a.expected)
            for (name, task, record), a in zip(rows, answers, strict=True)
        ]

    def reload(self) -> Reload:
        """Load the saved adapters onto a fresh base, and compare the logits of one batch."""
        names = [task.name for task in self.tasks]
        folders = [self.output / name for name in names]
        fresh = PeftModel.from_pretrained(self._load_base(), folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            fresh.load_adapter(folder, name)
        ours, theirs = self._logits(self.model), self._logits(fresh)
        difference = float((ours - theirs).abs().max())
        self.reloaded = Reload(tuple(folders), difference, len(ours))
        return self.reloaded

    def promises(self) -> list[Promise]:
        """What the quick start claims, each held against what was found."""
        structure, scores, reloaded = self.structure(), self.scores, self.reloaded
        assert scores is not None and reloaded is not None, "evaluate and reload come first"
        own = [scores.table[t.name, t.name] for t in self.tasks]
        base = scores.row(BASE, self.tasks)
        side_by_side = all(
            {a.name for a in site.adapters} == set(structure.adapters) for site in structure.sites
        )
        return [
            Promise(
                f"{len(self.tasks)} adapters stand side by side; none lies inside another",
                structure.is_flat and side_by_side and bool(structure.sites),
                f"{len(structure.nested)} of {len(structure.sites)} adapted layers nested",
            ),
            Promise(
                f"each adapter is above {ABOVE:.0%} on its own task, on unseen examples",
                min(own) > ABOVE,
                ", ".join(f"{share:.0%}" for share in own),
            ),
            Promise(
                f"the base alone is at most at {BELOW:.0%}",
                max(base) <= BELOW,
                ", ".join(f"{share:.0%}" for share in base),
            ),
            Promise(
                "reloaded on a fresh base, the adapters give equal outputs",
                reloaded.max_difference == 0.0,
                f"largest difference {reloaded.max_difference:g}",
            ),
        ]

    def _load_base(self) -> Any:
        dtype = self.recipe.dtype
        return training.load_model(self.base, dtype=dtype, device="cpu", quantize=self.quantize)

    def _mixed_rows(self) -> list[tuple[str, Task, training.Pair]]:
        """Rows in turn: a row of each adapter, again, and one of the base."""
        drawn = {
            task.name: training.pairs(examples(task, "heldout", ROWS_EACH, HELD_OUT_SEED + 1))
            for task in self.tasks
        }
        rows = [(t.name, t, drawn[t.name][n]) for n in range(ROWS_EACH) for t in self.tasks]
        first = self.tasks[0]
        return [*rows, (BASE, first, drawn[first.name][0])]

    def _logits(self, model: PeftModel) -> Tensor:
        """Logits ``(rows, tokens, vocabulary)`` of the mixed batch's prompts and answers."""
        rows = self._mixed_rows()
        coded = [training.encode_one(record, self.tokenizer) for _, _, record in rows]
        batch = training.collate(coded, training.pad_token(self.tokenizer))
        model.eval()
        with torch.inference_mode():
            names = [name for name, _, _ in rows]
            logits = model(
                input_ids=batch.ids,
                attention_mask=batch.inputs["attention_mask"],
                adapter_names=names,
            ).logits
        return logits[batch.inputs["attention_mask"].bool()]


def _input_of(task: Task, prompt: str) -> str:
    """What the prompt's frame holds."""
    before, _, after = task.prompt.partition("{text}")
    return prompt.removeprefix(before).removesuffix(after)


def _line(example: Example) -> str:
    """An example as a line of a data file."""
    row = {"prompt": example.prompt, "completion": example.completion}
    return json.dumps(row, ensure_ascii=False) + "\n"
