"""Direct preference optimisation: of two answers, the preferred one becomes likelier.

With ``r`` the log-probability of an answer less what the base alone gives it, ``c`` the chosen and
``j`` the rejected answer, a pair's loss is

    sigmoid:  -(1-ε)·log σ(β(r_c - r_j)) - ε·log σ(-β(r_c - r_j))         arXiv:2305.18290
    ipo:      (r_c/tokens_c - r_j/tokens_j - 1/(2β))²                     arXiv:2310.12036

The base with its adapters off is the reference, so no second model is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multigraft.errors import ConfigError, did_you_mean
from multigraft.model import PeftModel
from multigraft.train.batches import Batch, collate
from multigraft.train.encode import Encoded, Span, pieces_of
from multigraft.train.examples import Example
from multigraft.train.load import load_model
from multigraft.train.records import Preference, Record
from multigraft.train.spelling import spans_of
from multigraft.train.tasks.causal_lm import row_losses
from multigraft.train.tasks.contract import TASKS, Task
from multigraft.train.tasks.forwards import gathered


@dataclass(frozen=True)
class Preferred(Example):
    """Two answers after their prompt, as `Encoded.signed` gives them."""

    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Preferences(Task):
    """Prompts with a chosen and a rejected answer.

    Args:
        beta: how dear it is to leave the base; larger values stay closer.
        label_smoothing: ε, the share of pairs whose preference is thought to be wrong.
        loss: ``"sigmoid"`` or ``"ipo"``.

    Raises:
        ConfigError: a value is outside what its field allows.
    """

    name: ClassVar[str] = "dpo"
    task_type: ClassVar[str] = "CAUSAL_LM"
    call: ClassVar[Mapping[str, Any]] = {"use_cache": False}
    records: ClassVar[tuple[type[Record], ...]] = (Preference,)
    example: ClassVar[type[Example]] = Preferred

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: str = "sigmoid"

    def __post_init__(self) -> None:
        beta, smoothing = _number(self.beta), _number(self.label_smoothing)
        if not 0 < beta < math.inf:
            raise ConfigError(f"task `{self.name}`: `beta` (={self.beta!r}) must be above 0.")
        if not 0 <= smoothing < 0.5:
            raise ConfigError(
                f"task `{self.name}`: `label_smoothing` (={self.label_smoothing!r}) must be at "
                "least 0 and below 0.5."
            )
        if self.loss not in LOSSES:
            raise ConfigError(
                f"task `{self.name}`: `loss` (={self.loss!r}) must be one of {', '.join(LOSSES)}."
                f"{did_you_mean(str(self.loss), LOSSES)}"
            )
        if smoothing and self.loss != "sigmoid":
            raise ConfigError(
                f"task `{self.name}`: `label_smoothing` (={smoothing:g}) goes with the loss "
                f"`sigmoid`, not with `{self.loss}`."
            )

    def load(
        self, source: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None
    ) -> nn.Module:
        return load_model(source, dtype=dtype, device=device, quantize=quantize)

    def pieces(
        self, record: Preference, tokenizer: Any, max_length: int
    ) -> tuple[list[Preferred], bool]:
        (chosen, *_), is_one_cut = pieces_of(record.chosen, tokenizer, max_length)
        (rejected, *_), is_other_cut = pieces_of(record.rejected, tokenizer, max_length)
        return [Preferred(chosen.signed, rejected.signed)], is_one_cut or is_other_cut

    def spans(self, example: Preferred, tokenizer: Any) -> list[Span]:
        chosen = spans_of(Encoded.of_signed(example.chosen), tokenizer)
        rejected = spans_of(Encoded.of_signed(example.rejected), tokenizer)
        return [*chosen, Span("\nrejected: ", False), *(s for s in rejected if s.learned)]

    def learned(self, example: Preferred) -> int:
        return sum(token >= 0 for side in (example.chosen, example.rejected) for token in side[1:])

    def collate(self, examples: Sequence[Preferred], pad: int) -> Batch:
        """Each example's chosen row, and its rejected one after it."""
        sides = [side for e in examples for side in (e.chosen, e.rejected)]
        return collate([Encoded.of_signed(side) for side in sides], pad)

    def prepare(self, model: PeftModel, batch: Batch) -> Batch:
        """The batch with what the base alone gives each row, ``reference``; it draws nothing."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), model.disable_adapter():
                outputs = model(**batch.inputs, **self.call)
        finally:
            model.train(was_training)
        known = {"reference": -row_losses(outputs.logits, batch.labels)}
        return Batch(batch.inputs, {**batch.targets, **known}, batch.tokens)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        gains = self._gains(outputs, batch)
        own = LOSSES[self.loss](self, *gains.unbind(1))
        # A pair's loss stands at its chosen row.
        return torch.stack([own, torch.zeros_like(own)], 1).flatten()

    def _gains(self, outputs: Any, batch: Batch) -> Tensor:
        """How much likelier than by the base alone both answers are, ``(pairs, 2)``."""
        found = -row_losses(outputs.logits, batch.labels) - batch.targets["reference"]
        if self.loss == "ipo":
            found = found / (batch.labels[:, 1:] >= 0).sum(1).clamp(min=1)
        return found.unflatten(0, (-1, 2))

    def count(self, batch: Batch) -> int:
        return batch.rows // 2

    def measures(
        self, model: PeftModel, examples: Sequence[Any], *, pad: int, batch_size: int
    ) -> dict[str, float]:
        """How often the chosen answer has the larger reward, and by how much."""
        parts = gathered(
            self,
            model,
            examples,
            lambda out, batch: self._gains(out, batch).float().cpu(),
            pad=pad,
            batch_size=batch_size,
        )
        margins = self.beta * torch.cat([part[:, 0] - part[:, 1] for part in parts])
        return {
            "reward_accuracy": float((margins > 0).float().mean()),
            "reward_margin": float(margins.mean()),
        }


def _sigmoid(task: Preferences, chosen: Tensor, rejected: Tensor) -> Tensor:
    margin, smoothing = task.beta * (chosen - rejected), task.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _ipo(task: Preferences, chosen: Tensor, rejected: Tensor) -> Tensor:
    return (chosen - rejected - 1 / (2 * task.beta)).square()


LOSSES: dict[str, Callable[[Preferences, Tensor, Tensor], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
}


def _number(value: object) -> float:
    return float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]


TASKS.register(Preferences.name, Preferences)
