"""What `add_weighted_adapter` was asked for, checked as far as no model is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from multigraft.combine.contract import RULES, Options, Rule
from multigraft.combine.ranks import Rank, check_rank
from multigraft.errors import AdapterNameError, ConfigError, MultigraftWarning

DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
WHERE = "add_weighted_adapter"


@dataclass(frozen=True)
class Request:
    """What is to be combined, and how: checked as far as no model is needed.

    Args:
        adapters: names of the sources; one may stand there twice.
        weights: one for each, of either sign.
        rule: how.
        rank: of the result, for rules that truncate; the largest of the sources' by default.
        options: of the rule.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    rule: Rule
    rank: Rank | None
    options: Options

    @classmethod
    def of(
        cls,
        adapters: Sequence[str],
        weights: Sequence[float],
        combination_type: str,
        svd_rank: Rank | None,
        options: Options,
    ) -> Request:
        """Check the arguments of `add_weighted_adapter`.

        Raises:
            ConfigError: a value is outside what its argument allows.
            UnsupportedError: there is no such rule.
        """
        rule = RULES[combination_type]
        check_weights(adapters, weights)
        _check_options(rule, svd_rank, options)
        return cls(tuple(adapters), tuple(map(float, weights)), rule, svd_rank, options)


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse what are not names with a number each.

    Raises:
        AdapterNameError, ConfigError: say what is wrong.
    """
    if isinstance(adapters, str) or not adapters:
        raise AdapterNameError(f"{WHERE}: `adapters` (={adapters!r}) must be a list of names.")
    if len(weights) != len(adapters):
        raise ConfigError(
            f"{WHERE}: `weights` ({len(weights)} given) must hold one number for each of the "
            f"{len(adapters)} `adapters`."
        )
    if not all(_is_number(weight) for weight in weights):
        raise ConfigError(f"{WHERE}: `weights` (={list(weights)}) must be finite numbers.")


def _is_number(weight: object) -> bool:
    try:
        return math.isfinite(weight)  # type: ignore[arg-type]
    except TypeError:
        return False


def _check_options(rule: Rule, svd_rank: Rank | None, options: Options) -> None:
    given, density = options, options.density
    if rule.sparsify is not None and density is None:
        raise ConfigError(
            f"{WHERE}: `{rule.name}` needs `density`, the share of elements that stay: a number "
            "above 0 and at most 1."
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"{WHERE}: `density` (={density}) must be above 0 and at most 1.")
    if given.majority not in ("total", "frequency"):
        raise ConfigError(
            f"{WHERE}: `majority_sign_method` (={given.majority!r}) must be 'total' or 'frequency'."
        )
    if svd_rank is not None:
        check_rank(WHERE, "svd_rank", svd_rank)
    if given.clamp is not None and not 0 < given.clamp <= 1:
        raise ConfigError(
            f"{WHERE}: `svd_clamp` (={given.clamp}) is a quantile: above 0 and at most 1."
        )
    if given.driver not in DRIVERS:
        raise ConfigError(f"{WHERE}: `svd_driver` (={given.driver!r}) must be one of {DRIVERS}.")
    unused = [] if rule.truncates or svd_rank is None else ["svd_rank"]
    unused += [] if rule.truncates or given.clamp is None else ["svd_clamp"]
    unused += [] if rule.sparsify or density is None else ["density"]
    if unused:
        warnings.warn(
            f"{WHERE}: `{rule.name}` makes no use of {', '.join(f'`{n}`' for n in unused)}.",
            MultigraftWarning,
            stacklevel=5,
        )
