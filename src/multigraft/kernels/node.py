"""Nodes of the graph whose call costs no more than it must.

`torch.autograd.Function.apply` works out the signature of ``forward`` at every call of a function
with a ``setup_context``, to fill in defaults: 13 µs, as long as a small matrix product. A node has
no defaults, so it goes on to what comes after that.
"""

from __future__ import annotations

from typing import Any

import torch

IS_TRACED = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether `torch.compile` gives the gradients of a function that is traced into the graph.

With torch 2.11 they came out as zero; there, what is compiled is made of plain operators.
"""


class Node(torch.autograd.Function):
    """A function whose ``forward`` takes all its inputs by position and has no defaults."""

    @classmethod
    def apply(cls, *inputs: Any) -> Any:
        """The outputs, with this node behind them in the graph."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*inputs)  # torch.func has its own way through
        return super(torch.autograd.Function, cls).apply(*inputs)  # type: ignore[misc]
