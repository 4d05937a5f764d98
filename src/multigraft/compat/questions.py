"""What `isinstance` is asked of a layer with a LoRA by the kind of its base layer.

PEFT has a class for each pair of method and layer. Here they are questions, as `multigraft.kinds`
explains; none of them can be made.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from multigraft.graft import Graft
from multigraft.kinds import LoraLayer


class OnLayer(LoraLayer):
    """A LoRA on a base layer of certain types."""

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    named: ClassVar[str] = ""
    """A type of an optional package, by its name: an unloaded class has no instance."""

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether it is a LoRA of the weight of such a layer."""
        layer = graft.site.layer
        is_named = bool(cls.named) and any(t.__name__ == cls.named for t in type(layer).__mro__)
        is_of_types = isinstance(layer, cls.types) and not _is_quantised(layer)
        is_weight = graft.site.parameter is None
        return super().serves(graft) and is_weight and (is_named or is_of_types)


class Linear(OnLayer):
    """A LoRA on a linear layer whose weight is dense."""

    types = (nn.Linear,)


class Embedding(OnLayer):
    """A LoRA on an embedding."""

    types = (nn.Embedding,)


class Conv1d(OnLayer):
    """A LoRA on a one-dimensional convolution."""

    types = (nn.Conv1d,)


class Conv2d(OnLayer):
    """A LoRA on a two-dimensional convolution."""

    types = (nn.Conv2d,)


class Conv3d(OnLayer):
    """A LoRA on a three-dimensional convolution."""

    types = (nn.Conv3d,)


class Linear4bit(OnLayer):
    """A LoRA on one of bitsandbytes' 4-bit layers."""

    named = "Linear4bit"


class Linear8bitLt(OnLayer):
    """A LoRA on one of bitsandbytes' 8-bit layers."""

    named = "Linear8bitLt"


def _is_quantised(layer: nn.Module) -> bool:
    return any(t.__module__.startswith("bitsandbytes.") for t in type(layer).__mro__)
