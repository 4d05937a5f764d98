"""Values computed of tensors, kept until one of these is another tensor or has changed.

Torch counts changes of a tensor (``_version``), but not all: fused optimisers, those of other
packages and whoever writes through ``.data`` leave the count as it is. So a step of any optimiser
counts as well, and on the CPU the trained tensors, which are small, are compared with what they
were; elsewhere that would wait for the device.

A storage is told by the weak reference to it: its address cannot be another storage's meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Mark(NamedTuple):
    """What tells a tensor's state: a reference that keeps its storage's address, and the rest."""

    storage: Any
    rest: tuple[Any, ...]


class Steps:
    """How many steps the optimisers of this process have made; counted from the first look on."""

    def __init__(self) -> None:
        self.count = 0
        self._hook: Any = None

    def look(self) -> int:
        """The count now."""
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._more)
        return self.count

    def _more(self, *_: Any) -> None:
        self.count += 1


STEPS = Steps()


class Memo:
    """One such value. A copy of it, or a pickled one, knows nothing."""

    __slots__ = ("_key", "_marks", "_steps", "_value", "_values")

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._marks: list[Mark] = []
        self._values: list[Tensor] = []
        self._steps = -1
        self._key: object = None

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()

    def get(
        self,
        compute: Callable[[], Tensor],
        trained: Sequence[Tensor] = (),
        frozen: Sequence[Tensor | None] = (),
        key: object = None,
    ) -> Tensor:
        """The value, computed without gradients if there is none or it may be out of date.

        Args:
            trained: small tensors that it is computed of.
            frozen: large ones that no optimiser writes to; None stands for one of unknown state,
                of which nothing is kept.
            key: what else it is computed of, to be equal.
        """
        tensors = [*trained, *frozen]
        if _is_recorded(tensors):
            with torch.no_grad():
                return compute()
        if self._value is not None and self._key == key and self._is_current(trained, tensors):
            return self._value
        if torch.is_inference_mode_enabled():  # training must be able to use it later
            with torch.inference_mode(False):
                return self._made(compute, key, trained, tensors)
        return self._made(compute, key, trained, tensors)

    def kept(
        self,
        trained: Sequence[Tensor] = (),
        frozen: Sequence[Tensor | None] = (),
        key: object = None,
    ) -> Tensor | None:
        """The value, if there is one and it is not out of date; arguments are those of `get`."""
        tensors = [*trained, *frozen]
        if self._value is None or self._key != key or _is_recorded(tensors):
            return None
        return self._value if self._is_current(trained, tensors) else None

    @torch.no_grad()
    def _made(
        self,
        compute: Callable[[], Tensor],
        key: object,
        trained: Sequence[Tensor],
        tensors: Sequence[Tensor | None],
    ) -> Tensor:
        value = compute()
        self._keep(value, key, trained, tensors)
        return value

    def keep(
        self,
        value: Tensor,
        trained: Sequence[Tensor] = (),
        frozen: Sequence[Tensor | None] = (),
        key: object = None,
    ) -> None:
        """Keep a value that was computed elsewhere; arguments are those of `get`."""
        self._keep(value, key, trained, [*trained, *frozen])

    def _keep(
        self,
        value: Tensor,
        key: object,
        trained: Sequence[Tensor],
        tensors: Sequence[Tensor | None],
    ) -> None:
        known = self._marks if len(self._marks) == len(tensors) else [None] * len(tensors)
        marks = [None if t is None else _mark(t, m) for t, m in zip(tensors, known, strict=True)]
        if any(mark is None for mark in marks):
            self._value = None
            return
        self._value, self._key, self._steps = value, key, STEPS.look()
        self._marks = [mark for mark in marks if mark is not None]
        self._values = [t.detach().clone() for t in trained if t.device.type == "cpu"]

    def _is_current(self, trained: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> bool:
        if len(tensors) != len(self._marks) or (trained and STEPS.look() != self._steps):
            return False
        for tensor, mark in zip(tensors, self._marks, strict=True):
            if tensor is None or not _is_same(tensor, mark):
                return False
        return all(map(torch.equal, trained, self._values))


def _is_recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what runs now will be run again without this code, or sees no plain tensors."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    is_cuda = any(t is not None and t.is_cuda for t in tensors)
    return is_cuda and torch.cuda.is_current_stream_capturing()


def _mark(tensor: Tensor, known: Mark | None = None) -> Mark | None:
    """How to know the tensor's state again; None where that cannot be known.

    Args:
        known: an earlier mark, perhaps of the same storage.
    """
    if tensor.is_inference():
        return None  # whose changes are not counted
    if is_traceable_wrapper_subclass(tensor):
        marks = tuple(map(_mark, _parts(tensor)))
        return None if None in marks else Mark(marks, (type(tensor),))
    storage, held = tensor.untyped_storage(), None if known is None else known.storage
    if isinstance(held, StorageWeakRef) and held.cdata == storage._cdata:
        return Mark(held, _rest(tensor))
    return Mark(StorageWeakRef(storage), _rest(tensor))


def _parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that one of another class holds; a DTensor holds a mesh beside them."""
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names if isinstance(part := getattr(tensor, name), Tensor)]


def _is_same(tensor: Tensor, mark: Mark) -> bool:
    if isinstance(mark.storage, tuple):
        if type(tensor) is not mark.rest[0]:
            return False
        parts = _parts(tensor)
        return len(parts) == len(mark.storage) and all(map(_is_same, parts, mark.storage))
    is_plain = not tensor.is_inference() and not is_traceable_wrapper_subclass(tensor)
    return (
        is_plain
        and tensor.untyped_storage()._cdata == mark.storage.cdata
        and _rest(tensor) == mark.rest
    )


def _rest(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
