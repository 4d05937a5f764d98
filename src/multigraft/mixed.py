"""A mixed batch at one layer, or at several that read one input.

The base runs once for all rows. Adapters that are one low-rank pair there run together, in a fixed
number of operators; any other one runs on its own rows. Which is which is found once per route in
inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from multigraft import draws, kernels
from multigraft.bank import Bank, Frozen, frozen_of, joined, rate
from multigraft.errors import RoutingError
from multigraft.kernels import Dropped

if TYPE_CHECKING:
    from multigraft.layer import AdaptedLayer
    from multigraft.routing import Company as Row
    from multigraft.routing import Grouping, Route


class Company(NamedTuple):
    """The adapters of a route that act at some layers.

    Args:
        alone: rows' adapters that are not in the bank.
        rows: size of the input's first axis.
        rates: each row's dropout of what the bank's pairs see.
    """

    layers: Sequence[AdaptedLayer]
    alone: tuple[Row, ...]
    bank: Bank | None
    grouping: Grouping | None
    dtype: torch.dtype
    device: torch.device
    rows: int
    training: bool
    rates: tuple[float, ...]
    is_drawing: bool


def run_rows(layer: AdaptedLayer, route: Route, x: Tensor, args: Any, kwargs: Any) -> Any:
    """The layer's output with each row's own adapter.

    Args:
        x: the base layer's input, ``(rows, ...)``.
    """
    x = route.spread(x)
    company = _company([layer], route, x)
    assert company is not None  # a single layer's always is one
    if not (args or kwargs):
        whole = _whole(company, route, x)
        if whole is not None:
            return whole[0]
    base = y = layer.base_layer(x, *args, **kwargs)
    if company.bank is not None and company.grouping is not None:
        dropped = _dropped(company, route, x)
        y = company.bank.add(y, x if dropped is None else dropped.x, company.grouping)
    rows = dict(route.groups(x, layer)) if company.alone else {}
    for adapter in company.alone:
        y = _alone(layer, adapter, rows[adapter], x, y, base, args, kwargs)
    return y


def run_together(layers: Sequence[AdaptedLayer], route: Route, x: Tensor) -> list[Tensor] | None:
    """The outputs of layers that read the same input, or None where each must run by itself."""
    x = route.spread(x)
    company = _company(layers, route, x)
    return None if company is None else _whole(company, route, x)


def _dropped(company: Company, route: Route, x: Tensor) -> Dropped | None:
    """What the bank's pairs see in place of ``x``, where there is dropout in it."""
    call = draws.call()
    if call is None or not any(company.rates):
        return None
    owners = tuple([row[0] if row else "" for row in route.rows])
    is_even = len(set(company.rates)) == 1
    rates = kernels.constants(company.rates, torch.float64, x.device)
    seeds = call.seeds(x, owners)
    return Dropped(*kernels.masked_input(x, seeds, company.rates[0] if is_even else rates))


def _whole(company: Company, route: Route, x: Tensor) -> list[Tensor] | None:
    """All base layers with all their adapters, where nothing else is to be done."""
    if company.bank is None or company.grouping is None or company.alone:
        return None
    if not company.bank.takes(x, company.grouping):
        return None
    frozen = [_frozen(layer, x) for layer in company.layers]
    ready = [own for own in frozen if own is not None and own[0].device == x.device]
    if len(ready) < len(frozen):
        return None
    return company.bank.run(x, ready, company.grouping, _dropped(company, route, x))


def _company(layers: Sequence[AdaptedLayer], route: Route, x: Tensor) -> Company | None:
    """Who acts at these layers; None where several layers do not have the same company."""
    key = (id(layers[0]), len(layers))
    known: Company | None = route.companies.get(key)
    if (
        known is not None
        and not torch.is_grad_enabled()
        and known.rows == x.shape[0]
        and known.dtype == x.dtype
        and known.device == x.device
        and known.training == layers[0].training
        and known.is_drawing == (draws.call() is not None)
        and all(a is b for a, b in zip(known.layers, layers, strict=True))
    ):
        return known
    company = _found(layers, route, x)
    if torch.is_grad_enabled():
        route.companies.pop(key, None)  # a step may follow, and change what was stacked
    elif company is not None:
        route.companies[key] = company
    return company


def _found(layers: Sequence[AdaptedLayer], route: Route, x: Tensor) -> Company | None:
    first = layers[0]
    adapters = [name for name, _ in route.groups(x, first)]
    is_drawing = draws.call() is not None
    pairs: list[list[Any]] = []
    together: list[tuple[Row, ...]] = []
    rates: list[tuple[float, ...]] = []
    alone: list[Row] = []
    for layer in layers:
        own = {}
        for adapter in adapters:
            grafts = layer.grafts_of(adapter)
            found = joined(grafts, layer.training, is_drawing)
            if found is not None:
                own[adapter] = found
            elif grafts:
                alone.append(adapter)
        pairs.append(list(own.values()))
        together.append(tuple(own))
        drops = {row: rate(layer.grafts_of(row), is_drawing) for row in own}
        rates.append(tuple([drops.get(row, 0.0) for row in route.rows]))
    if len(layers) > 1 and (alone or len(set(together)) > 1 or len(set(rates)) > 1):
        return None
    bank = Bank(pairs, x.dtype) if together[0] else None
    grouping = route.grouping(x, together[0]) if together[0] else None
    return Company(
        list(layers),
        tuple(alone),
        bank,
        grouping,
        x.dtype,
        x.device,
        x.shape[0],
        first.training,
        rates[0],
        is_drawing,
    )


def _frozen(layer: AdaptedLayer, x: Tensor) -> Frozen | None:
    """The base layer's weight and bias, if its call is nothing more and in the input's dtype."""
    graft = next((g for g in layer.all_grafts() if g.site.geometry), None)
    return None if graft is None else frozen_of(graft.site, x)


def _alone(
    layer: AdaptedLayer,
    adapter: Row,
    rows: Tensor,
    x: Tensor,
    y: Tensor,
    base: Tensor,
    args: Any,
    kwargs: Any,
) -> Tensor:
    """``y`` with one adapter's rows changed by it."""
    call = draws.call()
    if call is not None and call.adapter is None:
        with call.numbers(x.device, adapter[0]):
            return _alone(layer, adapter, rows, x, y, base, args, kwargs)
    plan = layer.plan_of(adapter)
    part = x.index_select(0, rows)
    if not plan.is_additive:
        args, kwargs = _for_rows(layer, adapter, rows, len(x), args, kwargs)
        return _placed(y, rows, layer.run(plan, part, args, kwargs), layer)
    own = y.new_zeros((len(rows), *y.shape[1:]))
    for graft in plan.deltas:
        where = layer.where(graft, x) if plan.by_token else None
        where = where if where is None else where.index_select(0, rows)
        own = graft.add(own, part, layer.training, base.index_select(0, rows), where)
    return y.index_add(0, rows, own)


def _called(row: Row) -> str:
    return " with ".join(f"`{name}`" for name in row)


def _for_rows(
    layer: AdaptedLayer, adapter: Row, rows: Tensor, size: int, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """The layer's further arguments for these rows.

    Raises:
        RoutingError: several tensors, of which it is not known that they go row by row.
    """
    more = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    known = all(g.site.parameter and g.site.takes_rows for g in layer.grafts_of(adapter))
    if more and not (known and all(value.shape[:1] == (size,) for value in more)):
        raise RoutingError(
            f"{layer.path} takes several tensors, and adapter {_called(adapter)} changes more "
            "than its output: which of their rows belong together is not known. Run the rows "
            "of each adapter in a batch of their own."
        )

    def own(value: Any) -> Any:
        return value.index_select(0, rows) if isinstance(value, Tensor) else value

    return tuple(own(value) for value in args), {n: own(value) for n, value in kwargs.items()}


def _placed(y: Any, rows: Tensor, own: Any, layer: AdaptedLayer) -> Any:
    """``y`` with these rows exchanged; a layer may give several tensors."""
    if isinstance(y, tuple) and isinstance(own, tuple):
        return tuple(_placed(a, rows, b, layer) for a, b in zip(y, own, strict=True))
    if not isinstance(y, Tensor) or own.shape[:1] != rows.shape:
        raise RoutingError(
            f"{layer.path} gives something else than rows, so rows of a batch cannot have adapters "
            "of their own here. Run the rows of each adapter in a batch of their own."
        )
    return y.index_copy(0, rows, own.to(y.dtype))
