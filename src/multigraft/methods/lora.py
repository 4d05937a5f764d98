"""Low-rank adaptation (LoRA).

    y = W x + scaling * B A dropout(x)        A: (rank, in)   B: (out, rank)
    scaling = alpha / rank,   or alpha / sqrt(rank) with `use_rslora`

Papers: Hu et al. 2021, arXiv:2106.09685, eq. 3; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
Departs: A ~ Kaiming uniform, as in the authors' code, not Gaussian as in the text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multigraft import initialisations
from multigraft.bases import serve_megatron
from multigraft.config import (
    PeftType,
    TargetedConfig,
    check_choice,
    check_names,
    check_patterns,
    check_token_table,
    pattern_value,
    require,
)
from multigraft.draws import dropout
from multigraft.errors import TargetError
from multigraft.fields import check_ranges
from multigraft.kernels import AnyPart
from multigraft.methods.contract import Method, Params, TensorSpec, method, writable
from multigraft.site import Site
from multigraft.variants import LoraRuntimeConfig, check_options, runtime_of, variant_for


@dataclass
class LoraConfig(TargetedConfig):
    """LoRA's options, under PEFT's names.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability that an element of the adapter's input is dropped in training.
        fan_in_fan_out: kept for the file format; the layer's own type says how it is stored.
        bias: ``"none"``, ``"lora_only"`` (biases of the adapted layers are trained too) or
            ``"all"`` (every bias is). Each adapter has its own copies: the base stays as it is.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        init_lora_weights: where A and B begin: True (B = 0), False (both random), or the name of
            one of `multigraft.initialisations`, such as ``"pissa"``.
        eva_config, corda_config, lora_ga_config, loftq_config: options of the initialisations of
            these names.
        rank_pattern, alpha_pattern: exceptions per site, regular expressions to values.
        lora_bias: give B a bias.
        target_parameters: parameters to adapt by themselves, whatever module reads them: names, or
            ends of dotted paths (``experts.gate_up_proj``); matrices, and experts' stacks of them.
        trainable_token_indices: tokens whose embeddings are trained as well: of the input
            embedding, or a dictionary from names of modules to theirs.
        megatron_config, megatron_core: for layers of a Megatron core of your own
            (`multigraft.bases.megatron`); those of ``megatron.core`` need neither.
        layer_replication: ranges of layers that the model has then (`multigraft.replication`).
        ensure_weight_tying: modules that share an embedding's weight share its adapter as well.
        use_dora: decompose the weight into magnitude and direction (`multigraft.variants.dora`).
        alora_invocation_tokens: act from these tokens of a row on (`multigraft.variants.alora`).
        use_qalora, qalora_group_size: let A see means of groups (`multigraft.variants.qalora`).
        use_bdlora: make A or B block-diagonal, a `BdLoraConfig` (`multigraft.variants.bdlora`).
        kasa_config: take the weight's noise out and train singular values, a `KasaConfig`
            (`multigraft.variants.kasa`).
        velora_config: train A on compressed activations, a `VeloraConfig`
            (`multigraft.variants.velora`).
        monteclora_config: sample A in training, a `MontecloraConfig`
            (`multigraft.variants.monteclora`).
        arrow_config: give tokens to other adapters, an `ArrowConfig` (`multigraft.variants.arrow`).

    The remaining fields are PEFT's; setting one that is not built yet is refused by name.
    """

    peft_type: str | PeftType | None = PeftType.LORA
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[list[int]] | None = None
    runtime_config: Any = field(default_factory=LoraRuntimeConfig)
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    _not_saved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "LoraConfig"
        self.target_parameters = check_names(where, "target_parameters", self.target_parameters)
        self.layer_replication = check_ranges("layer_replication", self.layer_replication)
        self.rank_pattern = check_patterns(where, "rank_pattern", self.rank_pattern)
        self.alpha_pattern = check_patterns(where, "alpha_pattern", self.alpha_pattern)
        self.trainable_token_indices = check_token_table(
            where, "trainable_token_indices", self.trainable_token_indices
        )
        for name, rank in _entries("r", self.r, "rank_pattern", self.rank_pattern):
            is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
            require(is_rank, where, name, rank, "an integer of at least 1")
        for name, alpha in _entries(
            "lora_alpha", self.lora_alpha, "alpha_pattern", self.alpha_pattern
        ):
            is_alpha = isinstance(alpha, (int, float)) and math.isfinite(alpha)
            require(is_alpha, where, name, alpha, "a finite number")
        p = self.lora_dropout
        is_share = isinstance(p, (int, float)) and 0.0 <= p < 1.0
        require(is_share, where, "lora_dropout", p, "a number of at least 0 and below 1")
        check_choice(where, "bias", self.bias, ("none", "all", "lora_only"))
        core = self.megatron_config
        is_core = core is None or isinstance(core, Mapping) or is_dataclass(core)
        require(is_core, where, "megatron_config", core, "a dictionary, a TransformerConfig, None")
        self.runtime_config = runtime_of(self.runtime_config)
        check_options(self)
        initialisations.settle_options(self)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        core = values["megatron_config"]
        if core:  # a TransformerConfig also holds dtypes and functions, which no file can
            plain = (str, int, float, list, dict, type(None))
            values["megatron_config"] = {k: v for k, v in core.items() if isinstance(v, plain)}
        return values


def _entries(
    name: str, value: Any, pattern_name: str, patterns: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """A field and its exceptions per site, each by the name that an error gives it."""
    return [(name, value), *((f"{pattern_name}[{k!r}]", v) for k, v in patterns.items())]


@method("LORA", config=LoraConfig, paper="arXiv:2106.09685")
class LoRA(Method):
    """LoRA at one site: constants from the config, tensors named by the geometry."""

    prefix = "lora_"
    geometries = frozenset(
        {"linear", "conv1d_transposed", "conv", "embedding", "experts"}
        | {"megatron_column", "megatron_row"}
    )

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.A, self.B = self.geometry.factors
        named = (site.tied or site).target
        self.rank = pattern_value(config.rank_pattern, named, config.r)
        self.alpha = pattern_value(config.alpha_pattern, named, config.lora_alpha)
        self.scaling = self.alpha / (math.sqrt(self.rank) if config.use_rslora else self.rank)
        self.scaling *= site.times
        is_lookup = self.geometry.name == "embedding"
        self.dropout = 0.0 if is_lookup else config.lora_dropout
        self.bias = "lora_B.bias" if config.lora_bias else None
        self.follows_ties = config.ensure_weight_tying
        self.start = initialisations.initialisation_for(config).at(self.geometry)
        self.variant = variant_for(config)
        self.own = None if self.variant is None or self.variant.is_pair else self.variant
        """The variant, where it does more than its pair of factors says."""
        refusal = self.geometry.check_rank(site.layer, self.rank) or self.start.refusal(self)
        if self.variant is not None:
            self.mergeable = self.variant.mergeable
            self.by_token = self.variant.by_token
            self.memory = self.variant.memory()
            self.needs_weight = self.variant.needs_weight
            self.needs_base = self.variant.needs_base
            self.has_exact_gradients = self.variant.has_exact_gradients
            self.identity_at_init = self.variant.identity_at_init
            self.trains_as_pair = self.variant.trains_as_pair(self)
            refusal = refusal or self.variant.refusal(self)
        refusal = refusal or self._plain_refusal()
        refusal = refusal or self._tie_refusal() or self._bias_refusal()
        if refusal:
            raise TargetError(f"LoRA cannot adapt {site}: {refusal}.")

    @classmethod
    def complete(cls, config: LoraConfig, model: nn.Module) -> None:
        if config.megatron_config:
            serve_megatron(config.megatron_core)
        chosen = variant_for(config)
        refusal = None if chosen is None else chosen.model_refusal(config, model)
        if refusal:
            raise TargetError(f"LoRA cannot adapt {type(model).__name__}: {refusal}.")

    @property
    def title(self) -> str:
        return self.name if self.variant is None else f"{self.name} ({self.variant.name})"

    def _plain_refusal(self) -> str | None:
        """Why more than a plain pair cannot be had here, or ``None``."""
        is_plain = self.variant is None and not self.bias and not self.start.takes_out
        if is_plain or not self.geometry.plain_only:
            return None
        what = "`lora_bias`" if self.bias else "`init_lora_weights`"
        what = what if self.variant is None else f"the variant {self.variant.name}"
        return f"{what} cannot be had on shards of a weight; leave it out"

    def _tie_refusal(self) -> str | None:
        """Why this site cannot share an embedding's pair, or ``None``."""
        if self.site.tied is None or (self.variant is None and not self.bias):
            return None
        what = "`lora_bias`" if self.variant is None else self.variant.name
        return f"`ensure_weight_tying` shares a plain pair, and {what} is more; leave one out"

    def thinned(self, params: Params) -> Params:
        site = self.site
        if not self.dropout or site.parameter is None or site.target != str(site):
            return params
        count, in_ = self.geometry.count(site.layer) or 1, self.geometry.sizes(site.layer)[0]
        mask = torch.nn.functional.dropout(params[self.A].new_ones(count, 1, in_), self.dropout)
        names = {self.A, initialisations.START_A} & params.keys()
        masked = {n: (params[n].unflatten(0, (count, -1)) * mask).flatten(0, 1) for n in names}
        return {**params, **masked}

    def from_tied(self, params: Params) -> Params:
        # The embedding looks up a row of (B A)ᵀ; a head with that weight multiplies by all of them.
        assert self.site.tied is not None and self.site.tied.geometry is not None
        A, B = self.site.tied.geometry.factors
        return {self.A: params[B].T, self.B: params[A].T}

    def _bias_refusal(self) -> str | None:
        """Why `lora_bias` cannot be had here, or ``None``."""
        site = self.site
        if self.bias and self.geometry.name == "embedding":
            return "`lora_bias` cannot be had on an embedding, in PEFT's files neither"
        # Where the layer does not run, B's bias can only be added to the layer's own.
        if not (self.bias and site.rebinds):
            return None
        if site.parameter is None and getattr(site.layer, "bias", None) is not None:
            return None
        return "`lora_bias` has no bias of the base to act on here; leave it False"

    def tensors(self) -> dict[str, TensorSpec]:
        a, b = self.geometry.factor_shapes(self.site.layer, self.rank)
        specs = {self.A: TensorSpec(a), self.B: TensorSpec(b)}
        if self.bias:
            specs[self.bias] = TensorSpec((b[0],))
        specs |= self.start.tensors(self)
        return specs if self.variant is None else specs | self.variant.tensors(self)

    def reset(self, params: Params) -> None:
        self.start.reset(self, params)
        if self.bias:
            nn.init.zeros_(params[self.bias])
        if self.variant is not None:
            self.variant.reset(self, params)

    def restore(self, params: Params, missing: Collection[str]) -> None:
        if missing and set(missing) <= self.start.tensors(self).keys():
            self.start.recover(self, writable(params, missing), missing)
        elif self.variant is not None and set(missing) <= self.variant.derived:
            self.variant.derive(self, params)
        else:
            super().restore(params, missing)

    def starts(self) -> dict[str, str]:
        """The names of A and B to those of where they began, if that is kept."""
        starts = (initialisations.START_A, initialisations.START_B)
        return dict(zip((self.A, self.B), starts, strict=True)) if self.start.takes_out else {}

    def apply(self, params: Params, x: Tensor) -> Tensor:
        if self.own is not None:
            return super().apply(params, x)
        return self.apply_factors(params, x)

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """A and B as the layer's arithmetic takes them."""
        if self.variant is not None:
            return self.variant.pair(self, params)
        return self.pair(params)

    def pair(self, params: Params) -> tuple[Tensor, Tensor]:
        """A and B, less where they began if the initialisation takes that out of the base."""
        A, B = params[self.A], params[self.B]
        return initialisations.moved(A, B, params) if self.start.takes_out else (A, B)

    def apply_factors(self, params: Params, x: Tensor) -> Tensor:
        """``scaling * B A x``, the plain pair, whatever the variant does with it."""
        A, B = self.factors(params)
        dtype = self.geometry.input_dtype(x, A)
        bias = params[self.bias].to(dtype) if self.bias else None
        h = self.geometry.project(self.site.layer, x, A.to(dtype))
        return self.geometry.lift(self.site.layer, h, B.to(h.dtype), bias) * self.scaling

    def add(
        self, params: Params, y: Tensor, x: Tensor, training: bool, base: Tensor | None = None
    ) -> Tensor:
        if self.own is not None:
            return self.own.add(self, params, y, x, training, base)
        if self.bias:
            return super().add(params, y, x, training)
        if self.dropout and training:
            x = dropout(x, self.dropout)
        A, B = self.factors(params)
        dtype = self.geometry.input_dtype(x, A)
        return self.geometry.add_low_rank(
            self.site.layer, y, x, A.to(dtype), B.to(dtype), self.scaling
        )

    def low_rank(self, params: Params) -> tuple[Tensor, Tensor, float] | None:
        if self.own is not None:
            return None if self.bias else self.own.low_rank(self, params)
        return None if self.bias else (*self.factors(params), self.scaling)

    def part(
        self, params: Params, W: Tensor, bias: Tensor | None, training: bool
    ) -> AnyPart | None:
        if self.own is None or self.bias:
            return None
        return self.own.part(self, params, W, bias, training)

    @classmethod
    def penalty(cls, config: LoraConfig, sites: Iterable[Params]) -> Tensor | None:
        variant = variant_for(config)
        return None if variant is None else variant.penalty(config, sites)

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        if self.own is not None:
            return self.own.delta(self, params, W)
        product = self.geometry.product(self.site.layer, *self.factors(params))
        return product * self.scaling

    def add_delta(self, params: Params, value: Tensor, W: Tensor | None = None) -> Tensor:
        if self.own is not None:
            return self.own.add_delta(self, params, value, W)
        A, B = self.factors(params)
        return self.geometry.add_product(self.site.layer, value, A, B, self.scaling)

    def delta_bias(self, params: Params) -> Tensor | None:
        return params[self.bias] * self.scaling if self.bias else None
