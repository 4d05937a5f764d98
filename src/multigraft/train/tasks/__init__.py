"""What can be learned: one file a task."""

from multigraft.train.tasks import causal_lm, dpo, embed, seq2seq, seq_cls, token_cls
from multigraft.train.tasks.contract import TASKS, Task, described, task_of
from multigraft.train.tasks.notes import read_task, write_task

__all__ = [
    "TASKS",
    "Task",
    "causal_lm",
    "described",
    "dpo",
    "embed",
    "read_task",
    "seq2seq",
    "seq_cls",
    "task_of",
    "token_cls",
    "write_task",
]
