"""Adaptive budget allocation (AdaLoRA).

    ΔW = scaling * B diag(E) A        A: (rank, in)   E: (rank, 1)   B: (out, rank)
    scaling = alpha / init_r

Ranks are pruned in training by their importance (`multigraft.methods._ranks`), and A and B are
drawn towards orthogonality: ‖A Aᵀ - I‖ + ‖Bᵀ B - I‖, averaged, is added to the loss.

Paper: Zhang et al. 2023, arXiv:2303.10512, eqs. 3 and 4.
Departs: PEFT divides by init_r + 1e-5, and so do we; the norm is not squared, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multigraft.config import (
    PeftType,
    TargetedConfig,
    check_choice,
    check_token_table,
    require,
    require_probability,
)
from multigraft.defaults import LORA_TARGETS, Targets
from multigraft.draws import dropout
from multigraft.methods._ranks import Ranks
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site

_BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

TARGETS: Targets = {
    **{name: value for name, value in LORA_TARGETS.items() if name != "xlm-roberta"},
    "bart": _BART,
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "opt": _BART,
    "roberta": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


@dataclass
class AdaLoraConfig(TargetedConfig):
    """AdaLoRA's options, under PEFT's names.

    Args:
        target_r: mean rank that is left in the end.
        init_r: rank at the start.
        tinit: steps before the first pruning.
        tfinal: steps after the last one.
        deltaT: steps from one pruning to the next.
        beta1, beta2: how slowly the averages of sensitivity and uncertainty move.
        orth_reg_weight: weight of the drive towards orthogonality.
        total_step: steps of the whole training.
        rank_pattern: which ranks are left, by ``<path>.lora_E``; written by training.
        lora_alpha: the update is scaled by ``lora_alpha / init_r``.
        lora_dropout: probability that an element of the adapter's input is dropped in training.
        bias: as in `LoraConfig`.
        init_lora_weights: start at no change; False starts at random.
        trainable_token_indices: as in `LoraConfig`.

    After every ``backward()`` and before ``zero_grad()``, training calls
    ``model.base_model.update_and_allocate(step)``. The remaining fields are PEFT's for LoRA.
    """

    peft_type: str | PeftType | None = PeftType.ADALORA
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    runtime_config: Any = None
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    site_patterns: ClassVar[tuple[str, ...]] = ()
    _not_saved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    _unbuilt: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "use_qalora"), False),
        **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "velora_config")),
        **dict.fromkeys(("megatron_config", "alora_invocation_tokens", "monteclora_config")),
        **dict.fromkeys(("layer_replication", "target_parameters", "use_bdlora", "arrow_config")),
        "alpha_pattern": {},
        "loftq_config": {},
        "runtime_config": {"ephemeral_gpu_offload": False},
        "kasa_config": None,
        "ensure_weight_tying": False,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        counts = {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        before = self.tinit + self.tfinal
        counts["total_step"] = before + 1
        for name, low in counts.items():
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= low
            why = f", above `tinit` + `tfinal` (={before})" if name == "total_step" else ""
            require(is_count, where, name, value, f"an integer of at least {low}{why}")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            require(0.0 < beta < 1.0, where, name, beta, "above 0 and below 1")
        weight, alpha = self.orth_reg_weight, self.lora_alpha
        is_weight = weight >= 0 and math.isfinite(weight)
        require(is_weight, where, "orth_reg_weight", weight, "a number of at least 0")
        require(math.isfinite(alpha), where, "lora_alpha", alpha, "a finite number")
        require_probability(where, "lora_dropout", self.lora_dropout)
        check_choice(where, "bias", self.bias, ("none", "all", "lora_only"))
        tokens = self.trainable_token_indices
        self.trainable_token_indices = check_token_table(where, "trainable_token_indices", tokens)


@method("ADALORA", config=AdaLoraConfig, paper="arXiv:2303.10512")
class AdaLoRA(Method):
    """Singular triplets, some of which are pruned."""

    prefix = "lora_"
    geometries = frozenset({"linear", "conv1d_transposed", "conv"})
    default_targets = TARGETS
    penalises_evaluation = True

    def __init__(self, site: Site, config: AdaLoraConfig) -> None:
        super().__init__(site, config)
        kept = self._kept()
        self.rank = config.init_r if kept is None else sum(kept)
        self.alpha, self.dropout = config.lora_alpha, config.lora_dropout
        scaling = config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)
        self.scaling = scaling / (config.init_r + 1e-5)

    def tensors(self) -> dict[str, TensorSpec]:
        in_, out = self.geometry.sizes(self.site.layer)
        in_ //= getattr(self.site.layer, "groups", 1)
        in_ *= math.prod(getattr(self.site.layer, "kernel_size", ()))
        return {
            "lora_A": TensorSpec((self.rank, in_)),
            "lora_E": TensorSpec((self.rank, 1)),
            "lora_B": TensorSpec((out, self.rank)),
        }

    def reset(self, params: Params) -> None:
        A, E, B = params["lora_A"], params["lora_E"], params["lora_B"]
        for tensor in (A, E, B):
            nn.init.normal_(tensor)
        if self.config.init_lora_weights:
            torch.randn(1)  # PEFT draws one number more here; the next ones are then the same
            nn.init.zeros_(E)
            nn.init.normal_(A, std=0.02)
            nn.init.normal_(B, std=0.02)

    def add(
        self, params: Params, y: Tensor, x: Tensor, training: bool, base: Tensor | None = None
    ) -> Tensor:
        if not self.rank:
            return y
        if not self.geometry.is_linear:
            return super().add(params, y, x, training)
        if self.dropout and training:
            x = dropout(x, self.dropout)
        A, B = params["lora_A"] * params["lora_E"], params["lora_B"]
        dtype = self.geometry.input_dtype(x, A)
        return self.geometry.add_low_rank(
            self.site.layer, y, x, A.to(dtype), B.to(dtype), self.scaling
        )

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        M = params["lora_B"] @ (params["lora_A"] * params["lora_E"])
        return self.geometry.from_matrix(self.site.layer, M * self.scaling)

    def packed(self, name: str, tensor: Tensor) -> Tensor:
        """The triplets that are kept; masked ones stay in memory, and out of the file."""
        kept, axis = self._kept(), 1 if name == "lora_B" else 0
        if kept is None or sum(kept) == tensor.shape[axis]:
            return tensor
        return tensor.index_select(axis, _places(kept, tensor))

    def unpacked(self, name: str, value: Tensor, tensor: Tensor) -> Tensor:
        """The file's triplets in their places, and zeros in those of the others."""
        kept, axis = self._kept(), 1 if name == "lora_B" else 0
        if kept is None or value.shape == tensor.shape:
            return value
        value = value.to(tensor)
        return torch.zeros_like(tensor).index_copy(axis, _places(kept, tensor), value)

    def _kept(self) -> list[bool] | None:
        patterns: dict[str, list[bool]] = self.config.rank_pattern or {}
        return patterns.get(f"{self.site.path}.lora_E")

    @classmethod
    def schedule(cls, config: AdaLoraConfig) -> Ranks:
        return Ranks(config)

    @classmethod
    def penalty(cls, config: AdaLoraConfig, sites: Iterable[Params]) -> Tensor | None:
        terms = []
        for params in sites:
            for P in (params["lora_A"], params["lora_B"].mT):
                gram = P @ P.mT
                terms.append(torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)))
        return config.orth_reg_weight * torch.stack(terms).mean() if terms else None


def _places(kept: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(kept, device=like.device).nonzero().flatten()
