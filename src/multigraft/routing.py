"""Routes: which adapter each row of a batch uses, for the length of a call.

The model owns the route; layers read it. Row indices are made once per device, not once per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from multigraft import draws
from multigraft.errors import RoutingError, did_you_mean

if TYPE_CHECKING:
    from multigraft.layer import AdaptedLayer
    from multigraft.roster import Roster

BASE = "__base__"
"""Stands for rows that no adapter acts on."""

Entry = str | Sequence[str]
"""What `adapter_names` holds for a row: a name, or the names of adapters that act together."""
Company = tuple[str, ...]
"""The adapters of a row; empty for `BASE`."""


class Grouping(NamedTuple):
    """Rows by adapter, as tensors.

    Args:
        slots: (adapters, places), row indices; an adapter with fewer rows repeats its first.
        valid: (adapters, places), 1.0 where the place is a row of its own, else 0.0.
        one_hot: (rows, adapters), 1.0 where the row is the adapter's.
        in_order: whether the slots count up from zero to the last row.
    """

    slots: Tensor
    valid: Tensor
    one_hot: Tensor
    in_order: bool


class Route:
    """Adapter names by row, resolved to row indices per adapter.

    Args:
        names: one entry per row of the batch; `BASE` for rows without an adapter.
        repeats: how often each row is repeated in succession (beams, returned sequences). Not every
            layer sees the repeated rows: an encoder runs before they are.
        tokens: sizes that a flattened ``(batch * tokens, ...)`` input may have, per row.
    """

    def __init__(self, names: Sequence[Entry], repeats: int = 1, tokens: int | None = None) -> None:
        self.rows = [company_of(entry) for entry in names]
        self.adapters = adapters_in(names)
        self.repeats = repeats
        self._sizes = {size for size in (1, repeats, tokens, repeats * (tokens or 1)) if size}
        """How many rows of a layer's input may stand for one row of the batch, in succession."""
        self._rows: dict[Company, list[int]] = {}
        for row, company in enumerate(self.rows):
            if company:
                self._rows.setdefault(company, []).append(row)
        self._indices: dict[tuple[torch.device, int], list[tuple[Company, Tensor]]] = {}
        self.companies: dict[tuple[int, int], Any] = {}
        """What layers keep for the length of the route: see `multigraft.mixed`."""
        self._groupings: dict[tuple[torch.device, int, tuple[Company, ...]], Grouping] = {}

    def groups(self, x: Tensor, layer: AdaptedLayer) -> list[tuple[Company, Tensor]]:
        """Pairs of a row's adapters and the indices of such rows into ``x``'s first axis.

        Args:
            x: a layer's input after `spread`.

        Raises:
            RoutingError: the first axis is neither the batch nor a multiple that a route knows.
        """
        if not self._rows:
            return []
        per_row, rest = divmod(x.shape[0], len(self.rows))
        if rest or per_row not in self._sizes:
            self._refuse(x, layer)
        key = (x.device, per_row)
        found = self._indices.get(key)
        if found is None:
            span = torch.arange(per_row, device=x.device)
            found = [
                (name, (torch.tensor(rows, device=x.device)[:, None] * per_row + span).reshape(-1))
                for name, rows in self._rows.items()
            ]
            self._indices[key] = found
        return found

    def grouping(self, x: Tensor, adapters: tuple[Company, ...]) -> Grouping:
        """The rows of these adapters, as the routed operators take them.

        Args:
            x: a layer's input that `groups` has accepted.
        """
        key = (x.device, x.shape[0], adapters)
        if key not in self._groupings:
            self._groupings[key] = self._grouped(x, adapters)
        return self._groupings[key]

    def _grouped(self, x: Tensor, adapters: tuple[Company, ...]) -> Grouping:
        per_row = x.shape[0] // len(self.rows)
        rows = [
            [row * per_row + k for row in self._rows[name] for k in range(per_row)]
            for name in adapters
        ]
        places = max(len(own) for own in rows)
        slots = [own + own[:1] * (places - len(own)) for own in rows]
        valid = [[1.0] * len(own) + [0.0] * (places - len(own)) for own in rows]
        one_hot = torch.zeros(x.shape[0], len(adapters))
        for index, own in enumerate(rows):
            one_hot[own, index] = 1.0
        in_order = [i for own in rows for i in own] == list(range(x.shape[0]))
        in_order = in_order and all(len(own) == places for own in rows)
        return Grouping(
            torch.tensor(slots, device=x.device),
            torch.tensor(valid, device=x.device),
            one_hot.to(x.device),
            in_order,
        )

    def spread(self, x: Tensor) -> Tensor:
        """An input that all rows share (positions, say) as one row per row of the batch."""
        if x.shape[0] != 1 or len(self.rows) == 1:
            return x
        return x.expand(len(self.rows) * self.repeats, *x.shape[1:])

    def _refuse(self, x: Tensor, layer: AdaptedLayer) -> NoReturn:
        raise RoutingError(
            f"{layer.path}: the input's first axis (={x.shape[0]}) is not the batch's "
            f"(={len(self.rows)} rows), so rows cannot be told apart here. Run the rows of each "
            "adapter in a batch of their own, or leave this layer out with `exclude_modules`."
        )


def company_of(entry: Entry) -> Company:
    """The adapters of a row, each once."""
    if isinstance(entry, str):
        return () if entry == BASE else (entry,)
    return tuple(dict.fromkeys(entry))


def adapters_in(names: Iterable[Entry]) -> Company:
    """Every adapter that these entries name, each once."""
    return tuple(dict.fromkeys(name for entry in names for name in company_of(entry)))


def check_names(names: Sequence[Entry], rows: int | None, roster: Roster) -> None:
    """Fail unless the roster can serve these rows now.

    Raises:
        RoutingError: wrong count, unknown adapter, or adapters merged or switched off.
        StateError: adapters of one row cannot act together.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, str)
    if not (is_list and all(_is_entry(entry) for entry in names)):
        raise RoutingError(
            f"`adapter_names` (={names!r}) must be a list with one name per row, or for a row a "
            f'list of names that act together; "{BASE}" stands alone.'
        )
    if rows is not None and len(names) != rows:
        raise RoutingError(
            f"`adapter_names` has {len(names)} names for a batch of {rows} rows. Give one per row, "
            f'"{BASE}" for rows without an adapter.'
        )
    adapters = adapters_in(names)
    check_present(adapters, roster)
    for name in sorted(adapters):
        roster.check_batchable(name)
    for company in {company_of(entry) for entry in names if not isinstance(entry, str)}:
        roster.check_together(company)


def check_draws(roster: Roster, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model draws random numbers for each adapter; fails where it cannot.

    Raises:
        RoutingError: the rows of the call are not those of the `per_adapter` block.
    """
    block = draws.block() if roster.root.training else None
    if block is None:
        return False
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
    if first is not None:
        owners = roster.route.rows if roster.route else [roster.acting()] * len(first)
        block.check(owners, first.shape[1] if first.dim() in (2, 3) else None)
    return True


def _is_entry(entry: object) -> bool:
    if isinstance(entry, (list, tuple)):
        return bool(entry) and all(isinstance(n, str) and n != BASE for n in entry)
    return isinstance(entry, str)


def check_present(names: Sequence[str], roster: Roster) -> None:
    """Fail unless these adapters are there and able to act, each on its own rows.

    Raises:
        RoutingError: unknown adapter, or adapters merged or switched off.
    """
    unknown = sorted(set(names) - set(roster.configs))
    if unknown:
        hint = did_you_mean(unknown[0], roster.configs)
        raise RoutingError(
            f"`adapter_names`: no adapter is called {', '.join(f'`{n}`' for n in unknown)}.{hint} "
            f"There are: {', '.join(f'`{n}`' for n in roster.configs) or 'none'}."
        )
    if roster.merged:
        raise RoutingError(
            f"`adapter_names`: adapters {roster.merged} are merged into the base and would act on "
            "every row. Call unmerge_adapter() first."
        )
    if not roster.enabled:
        raise RoutingError("`adapter_names`: adapters are disabled. Leave disable_adapter() first.")
