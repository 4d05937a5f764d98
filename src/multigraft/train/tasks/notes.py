"""The task of an adapter, in its folder: what loads the same base for it again, labels and all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from multigraft.atomic import write_text
from multigraft.base_notes import NOTES_NAME, read_notes, settings_of
from multigraft.train.tasks.causal_lm import CausalLM
from multigraft.train.tasks.contract import Task, described, task_of


def write_task(folder: str | os.PathLike[str], task: Task, base: nn.Module) -> None:
    """Note the task in an adapter's folder.

    Where the base is a plain language model there is nothing to note, and a note of an adapter that
    was there before is removed.

    Raises:
        CheckpointError: the disk refuses.
    """
    path = Path(folder) / NOTES_NAME
    if task.task_type == CausalLM.task_type:
        path.unlink(missing_ok=True)
        return
    notes = {"task": described(task), "base": settings_of(base)}
    write_text(path, json.dumps(notes, indent=2, ensure_ascii=False) + "\n")


def read_task(folder: str | os.PathLike[str]) -> Task:
    """The task of an adapter: a language model's where its folder says nothing.

    Raises:
        CheckpointError: the note is damaged.
        UnsupportedError, ConfigError: it names a task or an option that there is not.
    """
    notes = read_notes(folder)
    return task_of(notes["task"]) if notes else CausalLM()
