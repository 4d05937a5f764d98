"""What a method is: how one adapter changes one site.

An instance is the method at *one site for one adapter*: it holds constants (rank, scaling), never
tensors and never an adapter's name. It states its maths once, by its nature:

    additive  apply(params, x) -> what is added to y        delta(params, W) -> what is added to W
    map       input(params, x) -> x'  and/or  output(params, y) -> y'      both linear
    replace   module() -> a copy that stands in for the base layer

It writes no merge, dispatch, cast, device move or state-dict key: those exist once, elsewhere.
``params`` maps the names that `tensors` declares to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from multigraft.bases import Geometry
from multigraft.config import CONFIGS, PeftConfig
from multigraft.defaults import LORA_TARGETS, Targets
from multigraft.draws import dropout
from multigraft.kernels import AnyPart
from multigraft.registry import Registry
from multigraft.site import Site

Params = Mapping[str, Tensor]


class TensorSpec(NamedTuple):
    """One tensor of an adapter at a site.

    Args:
        shape: its sizes.
        trainable: a parameter that training changes; otherwise a frozen parameter.
        buffer: a buffer rather than a parameter.
        saved: whether it goes into the checkpoint.
        on_disk: its name in the file when that differs from the name in memory.
        dtype: a fixed dtype, e.g. of an index; the adapter's own by default.
        optional: a file may lack it, since it follows from the base; see `Method.restore`.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    buffer: bool = False
    saved: bool = True
    on_disk: str | None = None
    dtype: torch.dtype | None = None
    optional: bool = False


class Schedule(Protocol):
    """What changes an adapter in training besides the optimiser; it may keep state of its own."""

    def update(self, step: int, sites: Mapping[str, Params]) -> None:
        """What is due after a backward pass, before its gradients are dropped.

        Args:
            step: the number of the training step, from 1.
            sites: the adapter's tensors by its sites' paths.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it keeps, as tensors by name, and as values that JSON holds."""

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


class Method:
    """Base of every method; see the module's docstring for the contract."""

    name: ClassVar[str]
    prefix: ClassVar[str]
    """How the names of its tensors begin, e.g. ``"lora_"``; other packages filter on it."""
    kind: Literal["additive", "map", "replace"] = "additive"
    """Its nature; a method whose nature depends on the site sets it on the instance."""
    needs_weight: bool = False
    """Whether `delta` reads the base weight's values; a class's or an instance's trait."""
    needs_base: bool = False
    """Whether `add` reads the base layer's own output."""
    by_token: bool = False
    """Whether it acts on those tokens of a row that the call's spans name, and on no others."""
    batchable: ClassVar[bool] = True
    """Whether rows of one batch may use different adapters of this method."""
    mergeable: bool = True
    rides: ClassVar[bool] = False
    """Whether it stands beside another method that a config names: a bias, a saved module."""
    follows_ties: bool = False
    """Whether modules that share an embedding's weight share what an adapter does to it."""
    identity_at_init: bool = True
    """Whether a new adapter leaves the output unchanged (with the default initialisation)."""
    has_exact_gradients: bool = True
    """Whether gradients are those of the forward; a method may hold a part of it constant."""
    trains_as_pair: bool = True
    """Whether training too runs it as the pair that `low_rank` gives, with its input dropped."""
    penalises_evaluation: ClassVar[bool] = False
    """Whether its `penalty` is part of the loss in evaluation too."""
    geometries: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d_transposed"})
    """Names of the geometries that it can act on."""

    default_targets: ClassVar[Targets] = LORA_TARGETS
    """What ``target_modules=None`` means, by architecture."""

    rank: int = 0
    alpha: float = 0.0
    scaling: float = 1.0
    dropout: float = 0.0
    """Probability that an element of the adapter's input is dropped in training."""
    rank_dropout: float = 0.0
    """Probability that an output feature of the contribution is dropped in training."""
    rank_dropout_scale: bool = True
    """Whether the features that stay are scaled up for those that go."""
    module_dropout: float = 0.0
    """Probability that the whole contribution is dropped in training."""

    def __init__(self, site: Site, config: Any) -> None:
        self.site = site
        self.config = config

    @property
    def geometry(self) -> Geometry:
        """How the site's layer is shaped."""
        assert self.site.geometry is not None, "sites.find checks the method's geometries"
        return self.site.geometry

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return self.name

    @classmethod
    def complete(cls, config: Any, model: nn.Module) -> None:
        """Fill what depends on the model's architecture into the model's own copy of a config."""

    @classmethod
    def shared_specs(cls, config: Any, sites: Sequence[Site]) -> dict[str, TensorSpec]:
        """Tensors that all sites of one adapter share; `params` holds them beside a site's own."""
        return {}

    @classmethod
    def shared_values(cls, config: Any, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Initial values of `shared_specs`, made once per adapter, on the CPU."""
        return {}

    @classmethod
    def schedule(cls, config: Any) -> Schedule | None:
        """What changes an adapter in training besides the optimiser, or None."""
        return None

    @classmethod
    def penalty(cls, config: Any, sites: Iterable[Params]) -> Tensor | None:
        """What an adapter that trains adds to the model's loss, a scalar, or None."""
        return None

    def tensors(self) -> dict[str, TensorSpec]:
        """Names, as in PEFT's files, to what must be made at this site."""
        raise NotImplementedError(f"{type(self).__name__} must define `tensors`")

    def reset(self, params: Params) -> None:
        """Fill freshly allocated tensors in place with the initial values."""
        raise NotImplementedError(f"{type(self).__name__} must define `reset`")

    def restore(self, params: Params, missing: Collection[str]) -> None:
        """Fill the ``missing`` tensors in place, as in a new adapter; the others have values."""
        self.reset(writable(params, missing))

    def packed(self, name: str, tensor: Tensor) -> Tensor:
        """What goes into the file of a tensor in memory; all of it unless overridden."""
        return tensor

    def unpacked(self, name: str, value: Tensor, tensor: Tensor) -> Tensor:
        """The inverse: the file's ``value`` as it is in memory, where ``tensor`` is now."""
        return value

    def thinned(self, params: Params) -> Params:
        """In training, where a forward reads W + ΔW: the tensors with dropout in them.

        There is no input of the adapter's own there, so what is dropped is dropped for all that
        goes through the weight in one call.
        """
        return params

    def from_tied(self, params: Params) -> Params:
        """The tensors at this site, out of those of the embedding's site that it is tied to."""
        return params

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """Additive: what this adapter adds to the base layer's output for the input ``x``.

        The layer's arithmetic with ΔW in the weight's place, unless there is a cheaper way.
        """
        W = self.site.weight() if self.needs_weight else None
        dtype = next(iter(params.values())).dtype
        delta = self.delta(params, None if W is None else W.to(dtype))
        y = self.geometry.run(
            self.site.layer, x, delta.to(x.dtype) if x.is_floating_point() else delta
        )
        bias = self.delta_bias(params)
        return y if bias is None else y + self.as_output_bias(bias.to(y.dtype))

    def add(
        self, params: Params, y: Tensor, x: Tensor, training: bool, base: Tensor | None = None
    ) -> Tensor:
        """Additive: ``y + apply(dropout(x))``; overridden where a fused operator exists.

        Args:
            y: the output so far, of the base layer and of adapters before this one.
            base: the base layer's own output, when `needs_base`.
        """
        if not training:
            return y + self.apply(params, x).to(y.dtype)
        drops_whole = self.module_dropout or self.rank_dropout  # PEFT draws for both
        if drops_whole and torch.rand(1) <= self.module_dropout:
            return y
        if self.dropout:
            x = dropout(x, self.dropout)
        own = self.apply(params, x).to(y.dtype)
        return y + (self._drop_features(own) if self.rank_dropout else own)

    def _drop_features(self, own: Tensor) -> Tensor:
        """Leave out whole output features, that is, rows of ΔW."""
        _, out = self.geometry.sizes(self.site.layer)
        stays = (torch.rand(out) > self.rank_dropout).to(own)
        if self.rank_dropout_scale:
            stays = stays / stays.mean().clamp_min(1 / out)
        return own * self.as_output_bias(stays)

    def as_output_bias(self, bias: Tensor) -> Tensor:
        """A bias ``(out,)`` in the shape that broadcasts over the layer's output."""
        trailing = -1 - self.geometry.feature_axis(self.site.layer)
        return bias.reshape(-1, *(1,) * trailing)

    def low_rank(self, params: Params) -> tuple[Tensor, Tensor, float] | None:
        """Additive: (A, B, scale) when `apply` is exactly that pair; such adapters run together.

        Returns:
            A (rank, in), B (out, rank) and the scale; None when there is more to it.
        """
        return None

    def part(
        self, params: Params, W: Tensor, bias: Tensor | None, training: bool
    ) -> AnyPart | None:
        """Additive: the base layer with what `add` adds as part of one node, where it is no pair.

        In training it runs with the method's `dropout` of what the factors see.

        Args:
            W, bias: of a frozen layer whose call is ``x Wᵀ + bias``, ``(out, in)`` and ``(out,)``.
        """
        return None

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        """Additive: ΔW in the weight's layout. ``W`` is given when `needs_weight`, densely."""
        raise NotImplementedError(f"{type(self).__name__} must define `delta`")

    def add_delta(self, params: Params, value: Tensor, W: Tensor | None = None) -> Tensor:
        """Additive: ``value + delta`` in ``value``'s dtype; overridden where it fuses."""
        return value + self.delta(params, W).to(value.dtype)

    def delta_bias(self, params: Params) -> Tensor | None:
        """Additive: Δb ``(out,)``, or None."""
        return None

    def input(self, params: Params, x: Tensor) -> Tensor:
        """Map: what the base layer sees instead of ``x``; linear in ``x``."""
        return x

    def output(self, params: Params, y: Tensor) -> Tensor:
        """Map: what stands for the base layer's output ``y``; linear in ``y``."""
        return y

    def module(self) -> nn.Module:
        """Replace: the module that stands in for the base layer; its state is what is saved."""
        raise NotImplementedError(f"{type(self).__name__} must define `module`")


def writable(params: Params, names: Collection[str]) -> dict[str, Tensor]:
    """These tensors, of which those not among ``names`` are copies: writes to them are dropped."""
    return {n: t if n in names else t.detach().clone() for n, t in params.items()}


METHODS: Registry[type[Method]] = Registry("method")
"""Method classes by ``peft_type``."""

M = TypeVar("M", bound=type[Method])


def method(name: str, *, config: type[PeftConfig] | None, paper: str) -> Callable[[M], M]:
    """Register a method class, and its config under the same ``peft_type``."""

    def add(cls: M) -> M:
        cls.name = name
        cls.rides = config is None
        cls.__doc__ = (cls.__doc__ or "") + f"\n\n    Paper: {paper}\n"
        METHODS.register(name, cls)
        if config is not None:
            CONFIGS.register(name, config)
        return cls

    return add
