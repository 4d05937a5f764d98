"""Alpaca: an instruction, perhaps an input, and the output that is learned.

The tokeniser's chat template frames them where there is one. Base models without one get the frame
of the Alpaca data set itself.
"""

from __future__ import annotations

from multigraft.train.formats._turns import turns
from multigraft.train.formats.contract import (
    Format,
    Values,
    learnable,
    nested,
    optional_text,
    text_of,
)
from multigraft.train.records import Chat, Pair, Refusal

# The wording that models trained on Alpaca's data know: https://github.com/tatsu-lab/stanford_alpaca
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def read(row: Values, line: int) -> Chat:
    """One instruction as a conversation of one question, after its ``system`` and ``history``."""
    instruction, given = text_of(row, "instruction"), optional_text(row, "input")
    output = learnable(row, "output")
    frame = WITH_INPUT if given.strip() else WITHOUT_INPUT
    prompt = frame.format(instruction=instruction, input=given)
    before = [*_system(row), *_history(row)]
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    asked = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    plain = None if before else Pair(prompt, output, line)
    return Chat(turns([*before, *asked], "history"), line, plain)


def _system(row: Values) -> list[dict[str, str]]:
    text = optional_text(row, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _history(row: Values) -> list[dict[str, str]]:
    found = nested(row.get("history")) or []
    if not isinstance(found, list) or any(
        not isinstance(turn, list | tuple) or len(turn) != 2 for turn in found
    ):
        why = "`history` is not a list of question and answer"
        raise Refusal(why, "Give a list of [question, answer] lists")
    return [
        {"role": role, "content": text}
        for turn in found
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


FORMAT = Format(
    "alpaca",
    ("instruction", "output"),
    read,
    '{"instruction": "Translate.", "input": "bonjour", "output": "hello"}',
)
