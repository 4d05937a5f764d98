"""Which ranks an AdaLoRA adapter keeps, as training goes on.

    sensitivity   I = |w ∂L/∂w|,  smoothed: Ī ← β1 Ī + (1-β1) I
    uncertainty   U ← β2 U + (1-β2) |I - Ī|                 score s(w) = Ī U
    of a triplet  S_i = s(E_i) + mean s(A_i) + mean s(B_i)

The budget, a number of triplets over all sites, falls cubically from the initial to the target one;
the triplets with the lowest scores are masked: their E is set to zero.

Paper: Zhang et al. 2023, arXiv:2303.10512, eqs. 8 to 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from multigraft.errors import StateError
from multigraft.methods.contract import Params

Masks = dict[str, list[bool]]
"""Which triplets a site keeps, by the site's path."""


class Ranks:
    """The averages of one adapter, and what is pruned at which step.

    Args:
        config: the adapter's own; its `rank_pattern` is written here.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.averages: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self, step: int, sites: Mapping[str, Params]) -> None:
        """What is due after this step's backward pass, before its gradients are dropped.

        Args:
            step: the step's number, from 1 to the config's `total_step`.
            sites: the adapter's tensors by the sites' paths.

        Raises:
            StateError: there are no gradients to score by.
        """
        last = self.config.total_step - self.config.tfinal
        if step < last:
            self._observe(sites)
            if step > self.config.tinit and step % self.config.deltaT == 0:
                self._prune(sites, self._budget(step, sites))
        elif step == last:
            self._prune(sites, self._budget(step, sites))
            self.averages.clear()
        elif self.config.rank_pattern:
            for path, params in sites.items():
                _mask(params["lora_E"], self.config.rank_pattern[f"{path}.lora_E"])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it has seen so far, as tensors by name, and as values that JSON holds."""
        tensors = {
            f"{kind} {name} {path}": tensor
            for (path, name), both in self.averages.items()
            for kind, tensor in zip(("mean", "spread"), both, strict=True)
        }
        return tensors, {"rank_pattern": self.config.rank_pattern}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.averages.clear()
        for key, mean in tensors.items():
            kind, name, path = key.split(" ", 2)
            if kind == "mean":
                self.averages[path, name] = mean, tensors[f"spread {name} {path}"]
        self.config.rank_pattern = values["rank_pattern"]

    def _observe(self, sites: Mapping[str, Params]) -> None:
        for path, params in sites.items():
            for name, w in params.items():
                if w.grad is None:
                    raise StateError(
                        f"update_and_allocate: {path}.{name} has no gradient to score it by. Call "
                        "it after loss.backward() and before the optimiser's zero_grad()."
                    )
                now = (w * w.grad).abs()
                zeros = torch.zeros_like(w)
                mean, spread = self.averages.get((path, name), (zeros, zeros))
                mean = torch.lerp(now, mean, self.config.beta1)
                spread = torch.lerp((now - mean).abs(), spread, self.config.beta2)
                self.averages[path, name] = mean, spread

    def _budget(self, step: int, sites: Mapping[str, Params]) -> int:
        """How many triplets all sites together keep at this step."""
        config = self.config
        first = sum(len(params["lora_A"]) for params in sites.values())
        target = config.target_r * len(sites)
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((first - target) * left**3 + target)

    def _prune(self, sites: Mapping[str, Params], budget: int) -> None:
        scores = {path: self._scores(path) for path in sites}
        together = torch.cat(list(scores.values()))
        surplus = len(together) - budget
        masks: Masks = {}
        limit = torch.kthvalue(together, surplus).values if surplus > 0 else together.new_tensor(-1)
        for path, score in scores.items():
            masks[f"{path}.lora_E"] = (score > limit).tolist()
            _mask(sites[path]["lora_E"], masks[f"{path}.lora_E"])
        self.config.rank_pattern = masks

    def _scores(self, path: str) -> Tensor:
        """Scores of one site's triplets, ``(rank,)``."""
        try:
            A, B, E = (
                torch.mul(*self.averages[path, name]) for name in ("lora_A", "lora_B", "lora_E")
            )
        except KeyError:
            raise StateError(
                f"update_and_allocate: nothing was observed at {path} before its ranks are due. "
                "Call it after every step's backward pass, from the first step on."
            ) from None
        return E.flatten() + A.mean(1) + B.mean(0)


def _mask(E: Tensor, kept: list[bool]) -> None:
    """Set E to zero where a triplet is not kept; what is pruned in shape as well is left."""
    if len(kept) == len(E):
        E.masked_fill_(~torch.tensor(kept, device=E.device)[:, None], 0.0)
