"""What can be learned: one file a task."""

from multigraft.train.tasks import causal_lm
from multigraft.train.tasks.contract import TASKS, Task, described, task_of

__all__ = ["TASKS", "Task", "causal_lm", "described", "task_of"]
