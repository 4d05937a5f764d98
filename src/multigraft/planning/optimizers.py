"""Optimisers on the meta device, by name: those of a run, which make their own states.

What lives outside of torch can do nothing there, so it has its states' sizes stated here; a test
compares them with the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WIDE = 4
"""Bytes of a value that is not quantised."""
SMALL, BLOCK = 4096, 256
"""Values of a tensor from which on its state is quantised, and of a block."""


def bitsandbytes_bytes(numel: int, states: int = 2) -> int:
    """Blocks of 256 values of one byte with a float32 scale each; small tensors stay wide."""
    if numel < SMALL:
        return states * WIDE * numel
    return states * (numel + WIDE * -(-numel // BLOCK))


STATES: Mapping[str, Callable[[int], int]] = {
    "adamw8bit": bitsandbytes_bytes,
    "paged_adamw8bit": bitsandbytes_bytes,
}
"""Bytes of a parameter's state, by its elements."""


class Stated(torch.optim.Optimizer):
    """Allocates states of these sizes, and does nothing else."""

    def __init__(self, parameters: Sequence[nn.Parameter], size: Callable[[int], int]) -> None:
        super().__init__(list(parameters), {})
        self.size = size

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Allocate what is not there yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = {"state": _bytes(self.size(parameter.numel()))}


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


def maker(name: str) -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
    """What makes the optimiser of that name.

    Raises:
        UnsupportedError: there is none.
    """
    from multigraft.train.optimizer import OPTIMIZERS, make

    size = STATES.get(name)
    if size is not None:
        return partial(Stated, size=size)
    OPTIMIZERS[name]  # says what there is on a miss
    return partial(_made, make, name)


def _made(make: Any, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return make(name, parameters, lr=1e-4, weight_decay=0.0, options={})
