"""Random numbers of each adapter's own: in company it drops in training what it drops alone.

    with per_adapter({"a": Draw(seed=1, rows=4), "b": Draw(seed=2, rows=1)}):
        model(ids, adapter_names=["a"] * 4 + ["b"])
    with per_adapter({"a": Draw(seed=1, rows=4)}):
        model(own_ids)  # "a" is active, and drops the same elements of its rows

What is dropped is a function of places, not of an order:

    kept = hash(hash(seed, row) ^ hash(layer, call), place in the row) >= p

row: its place among the adapter's own; call: how often the layer ran before in the block. So
neither other rows, nor what a row is padded with at its end, nor blocks that checkpoints run again
change it. Layers that read one input, such as q, k and v, drop the same of it. What methods draw
besides (whole features, samples of A) comes from torch's generator, seeded for the adapter and the
layer while it runs. Without the block, everything is drawn from torch's generator as it stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.errors import RoutingError, UnsupportedError
from multigraft.kernels import masked_input, scrambled


@dataclass(frozen=True)
class Draw:
    """Where an adapter's random numbers come from in one block.

    Args:
        seed: any integer; another one each step.
        rows: how many of a batch are the adapter's.
        width: tokens of its rows, padding counted, when it is alone; None leaves it unchecked.
        first: the place of the first of them, where others of its rows are in other processes.
    """

    seed: int
    rows: int
    width: int | None = None
    first: int = 0


class Block:
    """What holds for the length of a `per_adapter` block.

    Args:
        draws: by adapter.
        calls: how often each layer ran so far, by path.
    """

    def __init__(self, draws: Mapping[str, Draw], calls: Mapping[str, int] | None = None) -> None:
        self.draws = dict(draws)
        self.calls = dict(calls or {})
        self._seeds: dict[tuple[tuple[str, ...], bool, torch.device], Tensor] = {}

    def check(self, owners: Sequence[Collection[str]], tokens: int | None) -> None:
        """Fail unless these draws are those of a call.

        Args:
            owners: the adapters of each row.
            tokens: of each row, if that is known.

        Raises:
            RoutingError: rows are missing or too many, have several adapters or none with a draw.
        """
        counts: dict[str, int] = {}
        for own in owners:
            name = _only(own)
            if name:
                counts[name] = counts.get(name, 0) + 1
        for name, rows in counts.items():
            draw = self.of(name)
            if draw.rows != rows:
                raise RoutingError(
                    f"per_adapter: adapter `{name}` has {rows} rows of the batch and a draw of "
                    f"{draw.rows}. Give it `Draw(seed, rows={rows})`."
                )
            is_alone = len(counts) == 1 and rows == len(owners)
            if tokens is None or draw.width is None or draw.width == tokens:
                continue
            if is_alone or draw.width > tokens:
                raise RoutingError(
                    f"per_adapter: adapter `{name}` has rows of a `width` (={draw.width}) that "
                    f"does not suit a batch of {tokens} tokens a row. Pad rows at their end."
                )

    def of(self, adapter: str) -> Draw:
        """The draw of one adapter.

        Raises:
            RoutingError: it has none.
        """
        if adapter not in self.draws:
            raise RoutingError(
                f"per_adapter: adapter `{adapter}` acts in this block and has no draw. Give it "
                "`Draw(seed, rows)`, with dropout or without."
            )
        return self.draws[adapter]

    def seeds(self, rows: tuple[str, ...], is_one: bool, device: torch.device) -> Tensor:
        """A seed for each row, ``(rows,)`` int32.

        Args:
            rows: the names of their adapters, "" where there is none.
            is_one: whether an adapter's rows are all the same one.
        """
        key = rows, is_one, device
        if key not in self._seeds:
            places = {name: self.of(name).first for name in set(rows) if name}
            found = []
            for name in rows:
                if not name:
                    found.append(0)
                    continue
                found.append(_hashed(32, self.of(name).seed, places[name]))
                places[name] += not is_one
            self._seeds[key] = torch.tensor(found, device=device).int()
        return self._seeds[key]

    @contextmanager
    def called(self, layer: str, read: str, acting: Collection[str]) -> Iterator[None]:
        """Let a layer run: one `Call` more.

        Args:
            acting: the adapters that act on all its rows.
        """
        number = self.calls.get(layer, 0)
        self.calls[layer] = number + 1
        with _now(_CALL, Call(self, layer, read, number, _only(acting))):
            yield


class Call:
    """One call of one layer in a block.

    Args:
        layer: its path.
        read: a name of its input, the same for all layers that read it.
        number: how often it ran before.
        adapter: whose rows the input has; None where they have several, or none.
    """

    def __init__(
        self, block: Block, layer: str, read: str, number: int, adapter: str | None
    ) -> None:
        self.block, self.layer, self.read, self.number = block, layer, read, number
        self.adapter = adapter
        self.drawn = 0
        """Dropouts so far."""

    def seeds(self, x: Tensor, rows: tuple[str, ...] | None = None) -> Tensor:
        """Seeds of the rows of ``x``, for one more dropout.

        Args:
            rows: the names of their adapters, unless all are the call's own.
        """
        own = rows
        if own is None:
            assert self.adapter is not None
            own = (self.adapter,) * self.block.of(self.adapter).rows
        is_one = x.shape[0] > 1 and x.stride(0) == 0
        seeds = self.block.seeds(own, is_one, x.device)
        if rows is None and x.shape[0] % len(own):
            seeds = seeds[:1]  # one for all rows, or what is no longer in rows
        here = _hashed(32, self.read, self.number, self.drawn)
        self.drawn += 1
        return scrambled(seeds ^ here)

    @contextmanager
    def numbers(self, device: torch.device, adapter: str | None = None) -> Iterator[None]:
        """Let torch's generators give one adapter's numbers; afterwards they go on as before.

        Args:
            adapter: the call's own unless named.
        """
        adapter = adapter or self.adapter
        assert adapter is not None
        own = Call(self.block, self.layer, self.read, self.number, adapter)
        seed = _hashed(63, self.block.of(adapter).seed, self.layer, self.number)
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        before = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            with _now(_CALL, own):
                yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


_BLOCK: ContextVar[Block | None] = ContextVar("block", default=None)
_CALL: ContextVar[Call | None] = ContextVar("call", default=None)
_open = 0
"""Blocks that anybody is in: what `torch.compile` can look at."""


@contextmanager
def per_adapter(draws: Mapping[str, Draw]) -> Iterator[None]:
    """In the block, forwards in training draw each adapter's random numbers from its own `Draw`.

    A layer that runs again draws anew, so that several forwards of one block differ; where adapters
    have different numbers of them, each forward wants a block and seeds of its own. What
    transformers' gradient checkpointing runs again draws what it drew; a model's own calls of
    `torch.utils.checkpoint` are not known here, as they are not to routes.

    Args:
        draws: one for each adapter that is called; those of no dropout need one too.
    """
    with _now(_BLOCK, Block(draws)):
        yield


def block() -> Block | None:
    """The block that this thread is in.

    Raises:
        UnsupportedError: it would be compiled into the graph, with its seeds.
    """
    if torch.compiler.is_compiling():
        if _open:
            raise UnsupportedError(
                "per_adapter: `torch.compile` would keep the seeds of the step that it traces. Run "
                "this model eagerly."
            )
        return None
    return _BLOCK.get()


def call() -> Call | None:
    """The call of a layer that runs now, in training and in a block."""
    return None if torch.compiler.is_compiling() else _CALL.get()


def own_numbers(x: Tensor) -> AbstractContextManager[None]:
    """Where torch's generators give the numbers of the adapter that acts on all of ``x``."""
    here = call()
    return nullcontext() if here is None or here.adapter is None else here.numbers(x.device)


def replay() -> Callable[[], AbstractContextManager[None]]:
    """Blocks for the runs of a part of the model that may run again: each draws what the first did.

    The first one is the block that there is; a later one begins where that one began.
    """
    here = block()
    if here is None:
        return nullcontext
    runs, draws, calls = count(), here.draws, dict(here.calls)
    return lambda: _now(_BLOCK, Block(draws, calls)) if next(runs) else nullcontext()


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` after a dropout, whose first axis is rows; the adapter's own one where it has one."""
    here = call()
    if here is None or here.adapter is None:
        return F.dropout(x, p)
    return masked_input(x, here.seeds(x), p)[0]


def _only(adapters: Collection[str]) -> str | None:
    """The one of these adapters, if there is any.

    Raises:
        RoutingError: there are several.
    """
    if len(adapters) > 1:
        raise RoutingError(
            f"per_adapter: the adapters {sorted(adapters)} act on one row, whose random numbers "
            "can be one adapter's alone. Let one act on each row."
        )
    return next(iter(adapters), None)


@lru_cache(maxsize=2**14)
def _hashed(bits: int, *values: int | str) -> int:
    """An integer of so many bits that follows from these values alone; signed where it is of 32."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    found = int.from_bytes(digest, "big") >> (64 - bits)
    return found - 2**31 if bits == 32 else found


@contextmanager
def _now(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    global _open
    token = variable.set(value)
    _open += variable is _BLOCK
    try:
        yield
    finally:
        _open -= variable is _BLOCK
        variable.reset(token)
