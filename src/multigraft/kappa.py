"""Which layers to adapt: those whose weights are best conditioned (KappaTune).

    κ(W) = s_max / (s_min + 1e-8)        of a stack of experts, the mean over them

Paper: Sadeh-Or 2025, arXiv:2506.16289: weights of small κ can be changed with the least loss of
what they know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.progress import shown
from multigraft.storage import storage_of
from multigraft.survey import survey
from multigraft.tuner import base_of

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Ranks a base model's linear layers and stacks of experts by their condition numbers.

    They are computed once, at the first question.

    Args:
        model: the base model; adapters on it do not count.
        max_dim_size_to_analyze: leave out weights with a longer side: they take minutes each.
        moe_param_suffixes: how the names of experts' stacks end.
        show_progress: show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = base_of(model)
        self.longest = max_dim_size_to_analyze
        self.suffixes = tuple(moe_param_suffixes or EXPERTS)
        self.show_progress = show_progress
        self._layers: dict[str, float] | None = None
        self._experts: dict[str, float] | None = None

    def get_best_targets(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """Paths of linear layers, for `target_modules`, the best conditioned first.

        Args:
            top_p: this share of them, at least one.
            num_modules: so many; wins over ``top_p``.
            threshold: those with at most this κ, if neither is given.
        """
        if self._layers is None:
            layers = [s for s in survey(self.model) if isinstance(s.layer, nn.Linear)]
            bar = shown(layers, "Condition numbers of layers", self.show_progress)
            self._layers = self._kappas({s.path: (s.layer, "weight") for s in bar})
        return _best(self._layers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """Names of stacks of experts, for `target_parameters`; see `get_best_targets`."""
        if self._experts is None:
            stacks = {
                f"{spot.path}.{name}": (spot.layer, name)
                for spot in survey(self.model)
                for name, value in spot.layer._parameters.items()
                if value is not None and value.dim() == 3
            }
            known = [name for name in stacks if name.endswith(self.suffixes)]
            bar = shown(known, "Condition numbers of experts", self.show_progress)
            self._experts = self._kappas({name: stacks[name] for name in bar})
        return _best(self._experts, top_p, num_modules, threshold)

    @torch.no_grad()
    def _kappas(self, weights: dict[str, tuple[nn.Module, str]]) -> dict[str, float]:
        found = {}
        for path, (layer, name) in weights.items():
            W = storage_of(layer, name).read(layer, name)
            if max(W.shape[-2:]) <= self.longest:
                found[path] = _kappa(W.float())
        return found


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The best conditioned share of the layers, and of the stacks of experts if there are any.

    Returns:
        ``target_modules`` and ``target_parameters`` for a `LoraConfig`; see `KappaTuneSelector`.
    """
    options: dict[str, Any] = {
        "max_dim_size_to_analyze": max_dim_size_to_analyze,
        "moe_param_suffixes": moe_param_suffixes,
        "show_progress": show_progress,
    }
    selector = KappaTuneSelector(model, **options)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _kappa(W: Tensor) -> float:
    values = torch.linalg.svdvals(W)
    return float((values[..., 0] / (values[..., -1] + 1e-8)).mean())


def _best(
    kappas: dict[str, float], share: float | None, count: int | None, threshold: float | None
) -> list[str]:
    order = sorted(kappas, key=kappas.__getitem__)
    if count is not None:
        return order[:count]
    if share is not None:
        return order[: max(1, int(len(order) * share))]
    return [name for name in order if threshold is None or kappas[name] <= threshold]
