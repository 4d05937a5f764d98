"""A ledger of every storage that operators make and let go of, on any device, meta among them.

On the meta device tensors have sizes and no memory: a training step of the largest model can be
run there operator by operator, and what would be alive at every moment is read from the ledger.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multigraft.planning.flops import flops_of

PHASES = START, FORWARD, LOSS, BACKWARD, UPDATE = range(5)
"""The phases of a step; what is there before it belongs to the start."""


class Ledger(TorchDispatchMode):
    """Counts while it is entered; what was there before is told by `hold`.

    Attributes:
        events: (number of the storage, bytes), negative when it goes.
        made_in: the phase in which each storage appeared, by number.
        live: numbers of the storages that are alive.
        flops: floating-point operations of products and attention, by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.made_in: list[int] = []
        self.phase = START
        self.live: dict[int, int] = {}
        self.flops = [0] * len(PHASES)
        self._numbers: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = WITHOUT_VALUES.get(func)
        is_known = known is not None and args[0].is_meta
        found = (known if is_known else func)(*args, **(kwargs or {}))  # type: ignore[misc]
        self.hold(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        self.flops[self.phase] += flops_of(func, args, found)
        return found

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Enter the storages of these tensors that are not in it yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._numbers:
                continue
            number, size = len(self.made_in), storage.nbytes()
            self.made_in.append(self.phase)
            self.events.append((number, size))
            self.live[number] = size
            self._numbers[address] = number
            self._watches[number] = weakref.ref(storage, self._forgetting(address, number, size))

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The storages that these tensors lie in, entered if need be."""
        tensors = list(tensors)
        self.hold(tensors)
        return {self._numbers[tensor.untyped_storage()._cdata] for tensor in tensors}

    def _forgetting(self, address: int, number: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self._numbers[address], self.live[number], self._watches[number]
            self.events.append((number, -size))

        return forget


def totals(events: Iterable[tuple[int, int]]) -> list[int]:
    """Bytes alive after each event."""
    found, now = [], 0
    for _, change in events:
        now += change
        found.append(now)
    return found


def peak_of(events: Sequence[tuple[int, int]]) -> dict[int, int]:
    """What is alive at the moment when most is: bytes by number of the storage."""
    course = totals(events)
    until = max(range(len(course)), key=course.__getitem__, default=-1)
    alive: dict[int, int] = {}
    for number, change in events[: until + 1]:
        if change < 0:
            alive.pop(number, None)
        else:
            alive[number] = change
    return alive


def _no_value(tensor: Tensor) -> Any:
    """Of a mask, that something in it is masked."""
    return torch.zeros((), dtype=tensor.dtype).item()


def _everywhere(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), tensor.dim(), dtype=torch.long, device="meta")


def _grouped(left: Tensor, right: Tensor, offsets: Any = None, *more: Any, **_: Any) -> Tensor:
    """Products of groups of rows or columns; torch's own has no sizes for all dtypes."""
    groups = [] if left.dim() != right.dim() else [max(left.shape[0], right.shape[0])]
    if left.dim() == right.dim() == MATRIX:
        groups = [len(offsets)]
    return left.new_empty(*groups, left.shape[-2], right.shape[-1])


MATRIX = 2
WITHOUT_VALUES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense.default: _no_value,
    torch.ops.aten.is_nonzero.default: lambda tensor: False,
    torch.ops.aten.nonzero.default: _everywhere,
    torch.ops.aten._grouped_mm.default: _grouped,
}
"""Operators that need values, or that torch gives no sizes for; on the meta device, the most that
values could make of them."""
