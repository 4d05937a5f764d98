"""Whether a merged model says what the adapters said, by the outputs of both on the same inputs.

Both run in float32 on weights as they are stored, so that what differs is the merged weights'
rounding and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import MergeError, UnsupportedError
from multigraft.merging.base import MappedModel
from multigraft.merging.running import streamed
from multigraft.model import PeftModel

LENGTH = 32
SHARE = 0.05
"""Of what the adapters change: how much of it may be lost."""
ROUNDING = 4.0
LEAST = 1e-4
"""Relative to the outputs: what rounding weights to their dtype can do, and float32 in any case."""


@dataclass(frozen=True)
class Verdict:
    """What the outputs of the merged model have in common with those of the adapters.

    Args:
        difference: ‖merged - adapters‖ over all outputs; of logits, less their mean over the
            vocabulary, which no probability depends on.
        change: ‖adapters - base‖ of the same.
        allowed: the largest difference that is taken for rounding.
        agreement: share of places at which the largest output is the same one.
        places: how many there are.
    """

    difference: float
    change: float
    allowed: float
    agreement: float
    places: int

    @property
    def is_good(self) -> bool:
        """Whether the merged model is the adapters'."""
        return self.difference <= self.allowed

    @property
    def is_telling(self) -> bool:
        """Whether a model with nothing merged would have been found out."""
        return self.change > self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "is_good": self.is_good, "is_telling": self.is_telling}

    def require(self) -> None:
        """Fail unless the two agree.

        Raises:
            MergeError: they do not.
        """
        if not self.is_good:
            raise MergeError(
                f"the merged model's outputs are {self.difference:.3g} away from the adapters', "
                f"who change the base's by {self.change:.3g}; at most {self.allowed:.3g} would be "
                "rounding. Nothing was kept. Is the base stored in a dtype that is too narrow for "
                "this change? Convert it to float32 or bfloat16, or keep the adapters."
            )


def inputs_for(model: nn.Module, prompts: Sequence[Sequence[int]] = ()) -> list[dict[str, Tensor]]:
    """Inputs of one row each: these prompts, or random tokens or pixels from a fixed seed.

    Raises:
        UnsupportedError: it is not known what the model takes.
    """
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(text, "vocab_size", None)
    if getattr(model, "main_input_name", "input_ids") == "input_ids" and vocabulary:
        length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
        # Tokens that stand for pictures and the like are usually the last ones.
        drawn = torch.randint(
            min(3, vocabulary - 1), max(4, vocabulary // 2), (length,), generator=generator
        )
        rows = [torch.tensor(list(prompt)) for prompt in prompts] or [drawn % vocabulary]
        found = [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows
        ]
        if getattr(config, "is_encoder_decoder", False):
            return [{**each, "decoder_input_ids": each["input_ids"]} for each in found]
        return found
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    if model.main_input_name == "pixel_values" and isinstance(size, int) and channels:
        return [{"pixel_values": torch.randn(1, channels, size, size, generator=generator)}]
    raise UnsupportedError(
        f"{type(model).__name__}: it is not known what to run it on, so its outputs cannot be "
        "compared. Merge with --check off, and compare the two yourself."
    )


@torch.no_grad()
def outputs(
    model: nn.Module, base: MappedModel, inputs: Sequence[dict[str, Tensor]]
) -> list[Tensor]:
    """A model's outputs, ``(places, numbers)`` for each of the inputs.

    Args:
        model: what is called.
        base: the modules in it that have mapped weights.
    """
    found = []
    with streamed(base):
        for each in inputs:
            out = model(**each)
            first = getattr(out, "logits", None)
            first = out[0] if first is None else first
            first = first.float().flatten(0, -2)
            found.append(first - first.mean(-1, keepdim=True) if first.shape[-1] > 1 else first)
    return found


def compare(
    merged: Sequence[Tensor], adapted: Sequence[Tensor], plain: Sequence[Tensor], dtype: torch.dtype
) -> Verdict:
    """The verdict on three models' outputs.

    Args:
        dtype: in which the merged weights are stored.
    """
    m, a, b = (torch.cat([each.flatten() for each in out]) for out in (merged, adapted, plain))
    change = float(torch.linalg.vector_norm(a - b))
    rounding = max(ROUNDING * torch.finfo(dtype).eps, LEAST) * float(torch.linalg.vector_norm(a))
    pairs = zip(merged, adapted, strict=True)
    same = torch.cat([x.argmax(-1) == y.argmax(-1) for x, y in pairs])
    difference = float(torch.linalg.vector_norm(m - a))
    allowed = max(rounding, SHARE * change)
    if not torch.isfinite(m).all():
        difference = float("inf")
    return Verdict(difference, change, allowed, float(same.float().mean()), len(same))


def verdict(
    base: MappedModel,
    adapted: PeftModel,
    names: Sequence[str],
    merged: MappedModel,
    inputs: Sequence[dict[str, Tensor]],
    dtype: torch.dtype,
) -> Verdict:
    """Run the base, the base with the adapters, and the merged model, and compare them."""
    adapted.set_adapter(list(names), inference_mode=True)
    own = outputs(adapted, base, inputs)
    with adapted.disable_adapter():
        plain = outputs(adapted, base, inputs)
    return compare(outputs(merged.model, merged, inputs), own, plain, dtype)
