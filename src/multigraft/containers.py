"""Where an adapted layer keeps its adapters' tensors: modules that are dictionaries by adapter.

The state-dict name of a tensor is ``<group>.<adapter>[.<leaf>]``, as in PEFT. Adapter names are
free: what a module name cannot hold (a dot, or the name of one of the container's own attributes)
is escaped there, and only there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from torch import Tensor, nn

from multigraft.errors import AdapterNameError


class Leaf(nn.Module):
    """The tensors of one group of one adapter, e.g. ``lora_A.<adapter>`` with ``weight``.

    Deliberately no ``nn.Linear``: nothing that looks for linear layers can take it for one.

    There are two or more for each adapter at each site. Of the seventeen attributes that torch
    gives a module most are tables of hooks, which hardly any leaf will ever hold: they are made
    when they are first asked for. That is a tenth of the time to make one, and a seventh of the
    objects that the garbage collector walks through.
    """

    def __init__(self) -> None:
        # Instead of nn.Module's, which makes them all.
        put = object.__setattr__
        put(self, "training", True)
        put(self, "_parameters", {})
        put(self, "_buffers", {})
        put(self, "_modules", {})

    def __getattr__(self, name: str) -> Any:
        if name in _MODULE_STATE:
            made = self.__dict__[name] = copy.copy(_MODULE_STATE[name])
            return made
        return super().__getattr__(name)

    def leaf(self, name: str) -> Leaf:
        """The leaf inside this one, made when it is first asked for."""
        found = self._modules.get(name)
        if found is None:
            found = self._modules[name] = Leaf()
            found.training = self.training
        assert isinstance(found, Leaf)
        return found

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={tuple(t.shape)}" for n, t in _own(self).items())


class AdapterDict(nn.Module):
    """A dictionary from adapter names to a `Leaf`, a module or a tensor."""

    def __getitem__(self, adapter: str) -> nn.Module | Tensor:
        name = escape(adapter)
        for table in (self._modules, self._parameters, self._buffers):
            item = table.get(name)
            if item is not None:
                return item
        raise KeyError(adapter)

    def __delitem__(self, adapter: str) -> None:
        name = escape(adapter)
        for table in (self._modules, self._parameters, self._buffers):
            table.pop(name, None)

    def __contains__(self, adapter: object) -> bool:
        return isinstance(adapter, str) and escape(adapter) in {*self._names()}

    def __iter__(self) -> Iterator[str]:
        return (unquote(name) for name in self._names())

    def __len__(self) -> int:
        return len(self._names())

    @property
    def is_empty(self) -> bool:
        """Whether no adapter has anything here; takes no longer among many adapters."""
        return not (self._modules or self._parameters or self._buffers)

    def keys(self) -> list[str]:
        """Adapter names, in order of addition."""
        return list(self)

    def values(self) -> list[nn.Module | Tensor]:
        """What is held, in the order of `keys`."""
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, nn.Module | Tensor]]:
        """Pairs of `keys` and `values`."""
        return [(name, self[name]) for name in self]

    def leaf(self, adapter: str) -> Leaf:
        """The adapter's `Leaf`, made when it is first asked for."""
        name = escape(adapter)
        found = self._modules.get(name)
        if found is None:
            found = self._modules[name] = Leaf()
            if not self.training:
                found.training = False
        assert isinstance(found, Leaf)
        return found

    def place(self, adapter: str, label: str, leaf: str) -> tuple[nn.Module, str]:
        """Where a tensor of the adapter is registered: its owner, and its name there.

        Args:
            label: of the site, where the adapter has several sites at one adapted layer.
            leaf: the tensor's name in the group; empty when the group is the tensor.
        """
        if not (label or leaf):
            return self, escape(adapter)
        owner = self.leaf(adapter)
        if label and leaf:
            owner = owner.leaf(label)
        return owner, leaf or label

    @staticmethod
    def key(adapter: str) -> str:
        """The adapter's name as a key of this module's tables."""
        return escape(adapter)

    def _names(self) -> list[str]:
        return list(dict.fromkeys((*self._modules, *self._parameters, *self._buffers)))


def hold(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor on a module: a Parameter as one, anything else as a buffer."""
    if isinstance(tensor, nn.Parameter):
        owner._parameters[name] = tensor
    else:
        owner._buffers[name] = tensor


def fetch(owner: nn.Module, name: str) -> Tensor:
    """The tensor under ``name``; always read afresh, since ``.to()`` and sharding replace them."""
    # By index, not by `get`: the table may be DeepSpeed's, which fetches what is asked for so.
    if name in owner._parameters:
        parameter = owner._parameters[name]
        if parameter is not None:
            return parameter
    buffer = owner._buffers[name]
    assert buffer is not None
    return buffer


def escape(adapter: str) -> str:
    """The adapter's name as part of a module's name; `urllib.parse.unquote` reads it back."""
    name = _ESCAPED.get(adapter)
    if name is None:
        name = adapter.replace("%", "%25").replace(".", "%2E")
        if hasattr(AdapterDict, name) or name in _MODULE_STATE:
            name = f"%{ord(name[0]):02X}{name[1:]}"
        _ESCAPED[adapter] = name
    return name


def check_name(adapter: object) -> str:
    """The name itself, when it can be a dictionary key, a module's name and a folder's name.

    Raises:
        AdapterNameError: it is empty, no string, or cannot be the name of a folder.
    """
    if not isinstance(adapter, str):
        raise AdapterNameError(f"adapter name (={adapter!r}) must be a string.")
    if not adapter.strip() or adapter in {".", ".."} or adapter.strip(". ") == "":
        raise AdapterNameError(
            f"adapter name (={adapter!r}) must hold a letter or a digit: it names a folder."
        )
    bad = sorted({c for c in adapter if c in "/\\:\0" or ord(c) < 32})
    if bad:
        raise AdapterNameError(
            f"adapter name (={adapter!r}) must not contain {bad}: it names a folder. "
            f"Use `{''.join('-' if c in bad else c for c in adapter)}`."
        )
    if adapter.lower() in FILE_NAMES:
        raise AdapterNameError(
            f"adapter name (={adapter!r}) is that of a file which stands beside adapters' folders."
        )
    if adapter.encode(errors="replace").decode() != adapter:
        raise AdapterNameError(
            f"adapter name (={adapter!r}) holds half a surrogate pair, which no file name can."
        )
    if len(adapter.encode()) > 200 or adapter.startswith("__"):
        raise AdapterNameError(
            f"adapter name (={adapter[:40]!r}) must be at most 200 bytes long and must not start "
            "with two underscores (`__base__` stands for the rows without an adapter)."
        )
    return adapter


FILE_NAMES = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "readme.md")
"""What a directory of adapters holds besides their folders, in lower case."""
_ESCAPED: dict[str, str] = {}
_MODULE_STATE = vars(nn.Module())
"""What torch puts into every module, as it is in a new one."""


def _own(module: nn.Module) -> dict[str, Tensor]:
    tables = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tables.items() if tensor is not None}
