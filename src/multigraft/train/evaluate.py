"""How good an adapter is: the loss on held-out examples, and exact match of what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multigraft.model import PeftModel
from multigraft.train.encode import expected_text, prompt_ids
from multigraft.train.load import pad_token
from multigraft.train.records import Record
from multigraft.train.tasks import Task
from multigraft.train.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt, beside what it should have written."""

    record: Record
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        """Whether the two are equal, but for white space around them."""
        return self.given.strip() == self.expected.strip()


def share_right(answers: Sequence[Answer]) -> float:
    """Exact match: the share of right answers, from 0 to 1."""
    return sum(answer.is_right for answer in answers) / len(answers) if answers else 0.0


def answer(
    model: PeftModel,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    adapter_names: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 64,
) -> list[Answer]:
    """Let the model continue each record's prompt, greedily.

    Args:
        adapter_names: one per record, ``"__base__"`` for none; the active adapters otherwise.
        max_new_tokens: where an answer that does not end is cut.
        batch_size: rows generated at once; rows of different adapters share batches.

    Returns:
        One answer per record, in their order.
    """
    prompts = [prompt_ids(record, tokenizer) for record in records]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    given = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        names = None if adapter_names is None else [adapter_names[row] for row in rows]
        written = generate(model, tokenizer, [prompts[row] for row in rows], names, max_new_tokens)
        for row, ids in zip(rows, written, strict=True):
            given[row] = tokenizer.decode(ids, skip_special_tokens=True)
    return [Answer(r, expected_text(r), g) for r, g in zip(records, given, strict=True)]


def generate(
    model: PeftModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    adapter_names: Sequence[str] | None,
    max_new_tokens: int,
) -> list[Tensor]:
    """Greedy continuations of token ids, as one batch; the mode of the model is evaluation.

    Returns:
        One tensor of new ids per prompt; padding of rows that ended early is included.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    ids, mask = left_padded(prompts, pad_token(tokenizer))
    own = getattr(model.get_base_model(), "generation_config", None)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=getattr(own, "eos_token_id", None) or tokenizer.eos_token_id,
        pad_token_id=pad_token(tokenizer),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode, whose tensors FSDP cannot gather into again
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                adapter_names=adapter_names,
            )
    finally:
        model.train(was_training)
    return list(out[:, ids.shape[1] :])


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``(rows, tokens)``, padded at the start so that all rows end together."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def mean_loss(
    model: PeftModel,
    examples: Sequence[Any],
    *,
    pad: int = 0,
    batch_size: int = 16,
    task: Task | None = None,
) -> float:
    """Mean loss over all examples, with the active adapters; of learned tokens by default."""
    task = task or CausalLM()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode, whose tensors FSDP cannot gather into again
            for start in range(0, len(examples), batch_size):
                batch = task.collate(examples[start : start + batch_size], pad).to(device)
                batch = task.prepare(model, batch)
                outputs = model(**batch.inputs, **task.call)
                total += float(task.losses(outputs, batch).sum())
                count += task.count(batch)
    finally:
        model.train(was_training)
    return total / max(1, count)
