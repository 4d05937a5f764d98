"""Fine-tuning: data, a training loop per adapter, evaluation.

    records = read_jsonl("dates.jsonl").check()
    model, tokenizer = load_model("…"), load_tokenizer("…")
    model = attach(model, LoraConfig(target_modules="all-linear"), "dates")
    lane = Lane(model, "dates", encode(records, tokenizer, 512).examples, Recipe(epochs=2))
    train(model, lane, on_step=print)

or all of that for several adapters at once, with checks before and files after, as one `Job`.
"""

from multigraft.train.batches import Batch, Order, collate
from multigraft.train.company import launched
from multigraft.train.data import Found, pairs, read, read_jsonl, stream
from multigraft.train.dataset import Split
from multigraft.train.encode import Encoded, Encoding, encode, encode_one, prompt_ids
from multigraft.train.evaluate import Answer, answer, generate, mean_loss, share_right
from multigraft.train.events import Evaluated, Event, Finished, OnEvent, Progress, Saved
from multigraft.train.formats import formats
from multigraft.train.job import AdapterJob, Job
from multigraft.train.lane import Lane
from multigraft.train.load import attach, load_model, load_tokenizer, pad_token
from multigraft.train.loop import OnStep, train
from multigraft.train.outcome import REPORT, Outcome, Prepared
from multigraft.train.output import check_output
from multigraft.train.preview import Preview, Shown, preview
from multigraft.train.recipe import SCHEDULES, Recipe
from multigraft.train.records import BadLine, Chat, Pair, Record, Records, Text
from multigraft.train.skeleton import load_base, load_skeleton
from multigraft.train.tasks import TASKS, Task, read_task, task_of, write_task
from multigraft.train.watch import Watch

__all__ = [
    "REPORT",
    "SCHEDULES",
    "TASKS",
    "AdapterJob",
    "Answer",
    "BadLine",
    "Batch",
    "Chat",
    "Encoded",
    "Encoding",
    "Evaluated",
    "Event",
    "Finished",
    "Found",
    "Job",
    "Lane",
    "OnEvent",
    "OnStep",
    "Order",
    "Outcome",
    "Pair",
    "Prepared",
    "Preview",
    "Progress",
    "Recipe",
    "Record",
    "Records",
    "Saved",
    "Shown",
    "Split",
    "Task",
    "Text",
    "Watch",
    "answer",
    "attach",
    "check_output",
    "collate",
    "encode",
    "encode_one",
    "formats",
    "generate",
    "launched",
    "load_base",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "mean_loss",
    "pad_token",
    "pairs",
    "preview",
    "prompt_ids",
    "read",
    "read_jsonl",
    "read_task",
    "share_right",
    "stream",
    "task_of",
    "train",
    "write_task",
]
