"""A mixed batch at one layer: the base once for all rows, and each row's own adapter.

Adapters that are one low-rank pair here run together, in a fixed number of operators; any other one
runs on its own rows. Which is which is found once per route in inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from multigraft.bank import Bank, Frozen, joined
from multigraft.errors import RoutingError

if TYPE_CHECKING:
    from multigraft.layer import AdaptedLayer
    from multigraft.routing import Company as Row
    from multigraft.routing import Route


class Company(NamedTuple):
    """The adapters of a route that act at one layer.

    Args:
        together: those in the bank; adapters that share their rows are one.
        alone: the others.
    """

    together: tuple[Row, ...]
    alone: tuple[Row, ...]
    bank: Bank | None
    dtype: torch.dtype
    training: bool


def run_rows(layer: AdaptedLayer, route: Route, x: Tensor, args: Any, kwargs: Any) -> Any:
    """The layer's output with each row's own adapter.

    Args:
        x: the base layer's input, ``(rows, ...)``.
    """
    x = route.spread(x)
    rows = dict(route.groups(x, layer))
    company = _company(layer, route, x, list(rows))
    frozen = None if args or kwargs or company.alone else _frozen(layer, x)
    grouping = None
    if company.bank is not None:
        grouping = route.grouping(x, company.together)
        whole = company.bank.run(x, frozen, grouping)
        if whole is not None:
            return whole
    base = y = layer.base_layer(x, *args, **kwargs)
    if company.bank is not None and grouping is not None:
        in_place = frozen is not None and not torch.is_grad_enabled()
        y = company.bank.add(y, x, grouping, in_place)
    for adapter in company.alone:
        y = _alone(layer, adapter, rows[adapter], x, y, base, args, kwargs)
    return y


def _company(layer: AdaptedLayer, route: Route, x: Tensor, adapters: Sequence[Row]) -> Company:
    known: Company | None = route.companies.get(id(layer))
    if (
        known is not None
        and not torch.is_grad_enabled()
        and known.dtype == x.dtype
        and known.training == layer.training
    ):
        return known
    pairs, alone = {}, []
    for adapter in adapters:
        grafts = layer.grafts_of(adapter)
        found = joined(grafts, layer.training)
        if found is not None:
            pairs[adapter] = found
        elif grafts:
            alone.append(adapter)
    bank = Bank(list(pairs.values()), x.dtype) if pairs else None
    company = Company(tuple(pairs), tuple(alone), bank, x.dtype, layer.training)
    if torch.is_grad_enabled():
        route.companies.pop(id(layer), None)  # a step may follow, and change what was stacked
    else:
        route.companies[id(layer)] = company
    return company


def _frozen(layer: AdaptedLayer, x: Tensor) -> Frozen | None:
    """The base layer's weight and bias, if its call is nothing more and in the input's dtype."""
    geometry = next((g.site.geometry for g in layer.all_grafts() if g.site.geometry), None)
    if geometry is None or torch.is_autocast_enabled(x.device.type):
        return None
    found = geometry.frozen_matrix(layer.base_layer)
    return found if found is not None and found[0].dtype == x.dtype else None


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
    plan = layer.plan_of(adapter)
    part = x.index_select(0, rows)
    if not plan.is_additive:
        if any(isinstance(more, Tensor) for more in (*args, *kwargs.values())):
            raise RoutingError(
                f"{layer.path} takes several tensors, and adapter {_called(adapter)} changes more "
                "than its output: which of their rows belong together is not known. Run the rows "
                "of each adapter in a batch of their own."
            )
        return y.index_copy(0, rows, layer.run(plan, part, args, kwargs).to(y.dtype))
    own = y.new_zeros((len(rows), *y.shape[1:]))
    for graft in plan.deltas:
        where = layer.where(graft, x) if plan.by_token else None
        where = where if where is None else where.index_select(0, rows)
        own = graft.add(own, part, layer.training, base.index_select(0, rows), where)
    return y.index_add(0, rows, own)


def _called(row: Row) -> str:
    return " with ".join(f"`{name}`" for name in row)
