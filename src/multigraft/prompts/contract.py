"""What a context method is: how one adapter changes what a model is given, rather than a weight.

    tokens     virtual tokens before the user's               table: (rows, width)
    cache      keys and values of tokens that never were      table: (rows, layers * 2 * width)
    attention  an amount added to what attention modules give

An instance holds the tensors of *one adapter*; it hangs at the model's handle, under PEFT's name
``prompt_encoder.<adapter>``, and not at sites of the base. How a call's arguments change is written
once per kind (`multigraft.prompts.call`), and who acts is the roster's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from multigraft.config import CONFIGS, PeftConfig
from multigraft.errors import StateError
from multigraft.registry import Registry

Slot = tuple[nn.Module, str]
"""The module that holds a tensor, and the tensor's name there."""

TABLE = "prompt_embeddings"
"""The name on disk of what a table holds."""


class Acting(Protocol):
    """Whoever knows which adapters act now."""

    def acts(self, adapter: str) -> bool:
        """Whether this one does."""


class Context(nn.Module):
    """Base of every context method; see the module's docstring for the contract.

    Args:
        config: the model's own copy, `complete`.
        model: the base model.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["tokens", "cache", "attention"]]
    layers: Mapping[int, tuple[int, int]] = MappingProxyType({})
    """Kind cache: (heads, size of one) of the keys of each layer that takes the prefix."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def complete(cls, config: Any, model: nn.Module) -> None:
        """Fill what depends on the model into its own copy of a config, and check that it fits.

        Raises:
            ConfigError: a size is not given, and the model's config does not tell it.
            UnsupportedError: the model cannot take this kind of context.
        """

    @property
    def is_flat(self) -> bool:
        """Whether the tensors of the file are the parameters themselves, so that it can be read."""
        return True

    def slots(self) -> dict[str, Slot]:
        """Where the tensors of the file are held, by key on disk; see `is_flat`."""
        raise NotImplementedError(f"{type(self).__name__} must define `slots`")

    def saved(self) -> dict[str, Tensor]:
        """The tensors of the file, by key on disk."""
        return {key: getattr(owner, leaf) for key, (owner, leaf) in self.slots().items()}

    def initialise(self, model: nn.Module) -> None:
        """Put initial values in, where they are not those that torch gives such modules."""

    def enter(self, roster: Acting, adapter: str) -> None:
        """Called when the adapter is attached: the place for hooks."""

    def leave(self) -> None:
        """Called when the adapter is detached: undoes `enter`."""


class Table(Context):
    """A context whose file holds one table, whatever network makes it in training."""

    embedding: nn.Embedding

    @classmethod
    def shape(cls, config: Any) -> tuple[int, int]:
        """Sizes of the table."""
        raise NotImplementedError(f"{cls.__name__} must define `shape`")

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """The table ``(rows, width)``, with gradients to the parameters.

        Args:
            indices: numbers of virtual tokens ``(...)``, for ``(..., width)`` of these alone.
        """
        rows = self.embedding.weight if indices is None else self.embedding(indices)
        return rows if self.is_flat else self.made(rows)

    def made(self, rows: Tensor) -> Tensor:
        """What the network makes of the embeddings, where it is not flat."""
        raise NotImplementedError(f"{type(self).__name__} must define `made`")

    def slots(self) -> dict[str, Slot]:
        if not self.is_flat:
            raise StateError(
                f"this {self.name} adapter is being trained through a network, and a file holds "
                "only the table that it makes. Load the file as an adapter of its own, with "
                "load_adapter(..., is_trainable=False)."
            )
        return {TABLE: (self.embedding, "weight")}

    @torch.no_grad()
    def saved(self) -> dict[str, Tensor]:
        if self.is_flat:
            return {TABLE: self.embedding.weight}
        was_training = self.training
        try:
            return {TABLE: self.eval()()}
        finally:
            self.train(was_training)


CONTEXTS: Registry[type[Context]] = Registry("context method")
"""Context methods by ``peft_type``."""

C = TypeVar("C", bound=type[Context])


def context(name: str, *, config: type[PeftConfig], paper: str) -> Callable[[C], C]:
    """Register a context method, and its config under the same ``peft_type``."""

    def add(cls: C) -> C:
        cls.name = name
        cls.__doc__ = (cls.__doc__ or "") + f"\n\n    Paper: {paper}\n"
        CONTEXTS.register(name, cls)
        CONFIGS.register(name, config)
        return cls

    return add


def grow(
    method: type[Context],
    config: Any,
    model: nn.Module,
    given: Mapping[str, Tensor],
    where: tuple[torch.dtype, torch.device],
) -> Context:
    """Make one context adapter: given tensors are taken over, or all are initialised.

    Args:
        given: values by key on disk; when all are given, no random number is drawn.
        where: dtype and device of its tensors.
    """
    dtype, device = where
    blank = on_meta(method, config, model)
    slots = blank.slots() if given else {}
    is_complete = bool(slots) and all(key in given for key in slots)
    if is_complete or device.type == "meta":
        grown = blank
    else:
        with device:
            grown = method(config, model).to(dtype)
        grown.initialise(model)
    for key, (owner, leaf) in (grown.slots() if given else {}).items():
        if key in given:
            value = given[key].to(device=device, dtype=dtype)
            owner._parameters[leaf] = nn.Parameter(value.clone())
    return grown.train(model.training)


def shapes(method: type[Context], config: Any, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the file, by key on disk."""
    slots = on_meta(method, config, model).slots()
    return {key: tuple(getattr(owner, leaf).shape) for key, (owner, leaf) in slots.items()}


def on_meta(method: type[Context], config: Any, model: nn.Module) -> Context:
    """An instance without memory, to ask for names and shapes."""
    with torch.device("meta"):
        return method(config, model)
