"""A verdict on a module, in words: why a config means it, or why not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from multigraft.errors import close_to
from multigraft.prompts import CONTEXTS
from multigraft.survey import Spot
from multigraft.targeting import ALL_LINEAR, Outcome, Verdict, clash, matches

BESIDE = {
    "SAVED_MODULE": "`modules_to_save`: a copy of it is trained",
    "BIAS": "`bias`: its bias is trained",
    "TOKEN_ADAPTER": "`trainable_token_indices`: rows of it are trained",
}
"""What is trained beside the main method, and which field asks for it."""


class Words:
    """Reasons for one config on one model.

    Args:
        config: the adapter's.
        spots: every module of the base.
    """

    def __init__(self, config: Any, spots: Sequence[Spot]) -> None:
        self.config = config
        self.wanted = getattr(config, "target_modules", None)
        names = self.wanted if isinstance(self.wanted, list) else []
        paths = [path for spot in spots for path in spot.paths]
        unused = [name for name in names if not any(matches([name], p) for p in paths)]
        known = sorted({path.rpartition(".")[2] for path in paths})
        self.nearest = {near: name for name in unused for near in close_to(name, known, 1)}

    def reason(self, spot: Spot, verdict: Verdict | None, methods: Sequence[str]) -> str:
        """Why the module is meant or not.

        Args:
            verdict: on its being a target; None where the config has none.
            methods: what the adapter would have there.
        """
        beside = list(dict.fromkeys(BESIDE[name] for name in methods if name in BESIDE))
        if verdict is None:
            is_context = str(self.config.peft_type) in CONTEXTS
            context = f"{self.config.peft_type} changes what the model is given"
            return "; ".join(beside) or (
                context if is_context else "nothing in the config means it"
            )
        if verdict.outcome is Outcome.CHOSEN:
            return "; ".join([self._how(verdict.by), *beside])
        if any(name not in BESIDE for name in methods):
            beside.insert(0, "`target_parameters` means a parameter of it")
        return "; ".join(beside) or self._why_not(spot, verdict)

    def _why_not(self, spot: Spot, verdict: Verdict) -> str:
        outcome, by = verdict
        if outcome is Outcome.UNNAMED:
            return self._unnamed(spot)
        if outcome is Outcome.NOT_LINEAR:
            return '"all-linear" means linear layers, and this is none'
        if outcome is Outcome.HEAD:
            return '"all-linear" leaves the output head alone; name it to adapt it'
        if outcome is Outcome.OTHER_LAYER:
            return f"{self._how(by)}, but `layers_to_transform` leaves its layer out"
        if outcome is Outcome.CLASH:
            return clash(self.config, spot.path).replace(spot.path, "it")
        if outcome is Outcome.EXCLUDED:
            return f"`exclude_modules` leaves it out: `{by}`"
        return f"{self._how(by)}, but `modules_to_save` trains a copy of it"

    def _how(self, by: str) -> str:
        """How a module was matched."""
        if by == ALL_LINEAR:
            return '"all-linear": a linear layer'
        if isinstance(self.wanted, str):
            return f"the expression `{by}` matches its path"
        usual = " (usual for this architecture)" if self.wanted is None else ""
        return f"its path matches `{by}`{usual}"

    def _unnamed(self, spot: Spot) -> str:
        if self.wanted is None:
            return "not among this architecture's usual targets"
        if isinstance(self.wanted, str):
            is_part = any(re.search(self.wanted, path) for path in spot.paths)
            hint = ": it matches a part of it and must match the whole" if is_part else ""
            return f"the expression does not match its path{hint}"
        near = self.nearest.get(spot.path.rpartition(".")[2])
        hint = f"; did you mean it by `{near}`?" if near else ""
        return f"its path ends in none of the names{hint}"
