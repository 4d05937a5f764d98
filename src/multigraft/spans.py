"""Spans: from which token of its row on an adapter acts, for the length of a call.

An adapter with invocation tokens (aLoRA) acts on the last occurrence of these tokens in a row and
on all that follows; a row without them is the base's. Spans count from the end of the row: what is
padded on the left, cached, or cut off before the head does not move them.

    row   p p a b c ⟨i i⟩ d e        invocation i i        span 4

The model owns the spans of its call, as it owns the route; layers read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multigraft.errors import RoutingError
from multigraft.recomputation import remembered
from multigraft.routing import check_draws

if TYPE_CHECKING:
    from multigraft.roster import Roster

OFFSETS = "alora_offsets"
"""The argument of a call that gives the spans of its rows, under PEFT's name."""
REMEDY = (
    f"Pass `{OFFSETS}`: for each row, how many of its last tokens the adapter acts on, or None "
    "where it does not."
)


class Spans:
    """How many of the last tokens of each row each adapter acts on.

    Args:
        counts: by adapter, ``(rows,)``; 0 where it does not act.
        tokens: how many tokens a row of the call has.
    """

    def __init__(self, counts: Mapping[str, Tensor], tokens: int) -> None:
        self._counts = counts
        self._tokens = tokens
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def where(self, adapter: str, x: Tensor, path: str) -> Tensor:
        """What broadcasts over a layer's output: True where the adapter acts.

        Args:
            x: the layer's input, ``(rows, tokens, in)``, or flattened to ``(rows * tokens, in)``.

        Raises:
            RoutingError: rows and tokens cannot be told apart.
        """
        counts = self._counts[adapter]
        rows = len(counts)
        key = (adapter, x.shape[:-1], x.device)
        if key not in self._masks:
            is_flat = x.dim() == 2 and x.shape[0] in (rows, rows * self._tokens)
            if not is_flat and (x.dim() != 3 or x.shape[0] != rows):
                raise RoutingError(
                    f"{path}: `{adapter}` acts on some tokens of each row, and the input's shape "
                    f"(={tuple(x.shape)}) is not (rows, tokens, in) for {rows} rows. Leave this "
                    "layer out with `exclude_modules`."
                )
            tokens = x.shape[0] // rows if is_flat else x.shape[1]
            place = torch.arange(tokens, device=x.device)
            mask = place >= tokens - counts.to(x.device)[:, None]
            self._masks[key] = mask.reshape(*x.shape[:-1], 1)
        return self._masks[key]


def invocations(roster: Roster) -> dict[str, list[int]]:
    """The invocation tokens of the adapters that the present call uses, by adapter."""
    names = roster.acting() if roster.route is None else roster.route.adapters
    found = {n: getattr(roster.configs.get(n), "alora_invocation_tokens", None) for n in names}
    return {name: tokens for name, tokens in found.items() if tokens}


def last_spans(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """How many tokens there are in each row from the last occurrence of ``tokens`` on.

    Args:
        ids: ``(rows, tokens)``.

    Returns:
        ``(rows,)``; 0 where they do not occur.
    """
    length, width = ids.shape[1], len(tokens)
    if width > length:
        return ids.new_zeros(len(ids))
    wanted = torch.tensor(tokens, device=ids.device)
    hits = (ids.unfold(1, width, 1) == wanted).all(-1)
    spans = torch.arange(length, width - 1, -1, device=ids.device)
    # Spans fall along the row: the last occurrence has the shortest of those that are there.
    shortest = torch.where(hits, spans, length + 1).amin(1)
    return shortest.where(shortest <= length, 0)


def spans_of_forward(
    roster: Roster, args: Sequence[Any], kwargs: dict[str, Any]
) -> AbstractContextManager[None]:
    """The block in which one forward of the model runs; takes `OFFSETS` out of ``kwargs``.

    Raises:
        RoutingError: where an adapter begins to act cannot be known.
    """
    given = kwargs.pop(OFFSETS, None)
    wanted = invocations(roster)
    is_drawing = check_draws(roster, args, kwargs)
    if not wanted:
        return nullcontext() if roster.route is None and not is_drawing else remembered(roster)
    counts, length = _counts(wanted, given, args, kwargs)
    if given is None and _cached(kwargs):
        _require_found(roster, counts)
    return _spanned(roster, Spans(counts, length))


def spans_of_generate(
    roster: Roster, args: Sequence[Any], kwargs: dict[str, Any]
) -> AbstractContextManager[None]:
    """The block in which one ``generate`` runs: the prompt says where, for all its forwards.

    Raises:
        RoutingError: where an adapter begins to act cannot be known.
    """
    given = kwargs.pop(OFFSETS, None)
    wanted = invocations(roster)
    if not wanted:
        return nullcontext()
    counts, length = _counts(wanted, given, args, kwargs)
    return _generating(roster, counts, length)


def _counts(
    wanted: Mapping[str, Sequence[int]],
    given: Sequence[int | None] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Tensor], int]:
    """Spans by adapter, and the length of the rows."""
    ids = _tokens_in(args, kwargs)
    batch = ids if ids is not None else kwargs.get("inputs_embeds")
    names = ", ".join(f"`{name}`" for name in wanted)
    if batch is None or (ids is None and given is None):
        raise RoutingError(
            f"{names}: the call has no token ids in which to look for invocation tokens. {REMEDY}"
        )
    rows, length = batch.shape[0], batch.shape[1]
    if given is None:
        assert ids is not None
        return {name: last_spans(ids, tokens) for name, tokens in wanted.items()}, length
    if len(given) != rows or not all(n is None or _is_count(n) for n in given):
        raise RoutingError(f"`{OFFSETS}` (={given!r}) does not suit a batch of {rows}. {REMEDY}")
    counts = torch.tensor([n or 0 for n in given], device=batch.device)
    return dict.fromkeys(wanted, counts), length


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def _tokens_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids of a call, ``(rows, tokens)``."""
    first = args[0] if args else None
    for ids in (kwargs.get("input_ids"), kwargs.get("inputs"), first):
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2):
            return ids if ids.dim() == 2 else ids[None]
    return None


def _cached(kwargs: Mapping[str, Any]) -> int:
    """How many tokens a cache holds already."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) else 0


def _require_found(roster: Roster, counts: Mapping[str, Tensor]) -> None:
    """Fail when what is cached may hold the invocation tokens that are not in the new tokens."""
    for name, found in counts.items():
        rows = [True] * len(found)
        if roster.route is not None:
            rows = [name in own for own in roster.route.rows]
        if any(row and not count for row, count in zip(rows, found.tolist(), strict=True)):
            raise RoutingError(
                f"`{name}`: the call goes on from a cache, and its tokens hold no invocation: "
                f"whether the cached ones do is not known. {REMEDY}"
            )


@contextmanager
def _spanned(roster: Roster, spans: Spans) -> Iterator[None]:
    """Let these spans decide, for the length of the block."""
    before, roster.spans = roster.spans, spans
    try:
        with remembered(roster):
            yield
    finally:
        roster.spans = before


def _moved(found: Tensor, written: int) -> Tensor:
    """Spans when so many tokens have been written since; 0 stays 0."""
    return (found + written).clamp_min(0).where(found > 0, 0)


@contextmanager
def _generating(roster: Roster, counts: Mapping[str, Tensor], length: int) -> Iterator[None]:
    """Move spans along with each forward of the base model, whatever of its rows is cached."""

    def move(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = _tokens_in(args, kwargs)
        batch = ids if ids is not None else kwargs["inputs_embeds"]
        rows, tokens = batch.shape[0], batch.shape[1]
        written = _cached(kwargs) + tokens - length
        moved = {
            # Beams and returned sequences repeat each row in succession.
            name: _moved(found, written).repeat_interleave(rows // len(found))
            for name, found in counts.items()
        }
        roster.spans = Spans(moved, tokens)

    before = roster.spans
    handle = roster.root.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        roster.spans = before
