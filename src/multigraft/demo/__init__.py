"""The demo that ships with the package: a small base model, three tasks, a training recipe."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from multigraft.demo.recipe import RECIPE, Recipe
from multigraft.demo.tasks import TASKS, Example, Task, examples, find_task

__all__ = ["RECIPE", "TASKS", "Example", "Recipe", "Task", "examples", "find_task", "model_path"]


def model_path() -> Path:
    """The folder of the demo base, for `from_pretrained`; it is package data, nothing is fetched.

    Pass ``dtype="float32"`` when loading: the weights are stored in bfloat16 to be small.
    """
    return Path(str(resources.files(__name__) / "model"))
