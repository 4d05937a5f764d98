"""A site: one place in the base model that an adapter can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.bases import HOSTS, Geometry
from multigraft.storage import Storage, slot_of


@dataclass(eq=False)
class Site:
    """A base layer under its base path, with what serves its shape and its storage.

    Args:
        path: dotted path in the base model; it never contains a wrapper's name.
        layer: the base module itself, never a wrapper.
        geometry: how a low-rank pair runs through it; None for modules that only whole-module
            methods can act on.
        storage: how its tensors are read and written.
        parameter: the tensor that is acted on when it is not the weight behind the forward: a
            bias, or a fused parameter of a module that reads it directly.
        kept: what the storage kept of the base's tensors while adapters are merged into them.
        peers: what all adapters hold at the wrapped layer, by adapter, as it changes.
        inner: where ``layer`` lies in the module that is wrapped for it; empty when that is
            ``layer`` itself.
        target: what configs' patterns match; the path unless a parameter is named.
        label: tells the tensors of several sites of one adapter at one adapted layer apart.
        times: how often an update counts here, see `multigraft.bases.attention`.
        tied: the site of the embedding whose weight this one shares, and what an adapter does to
            it: it holds the adapter's tensors for both.
        shared: the layer's parameters that several modules hold, by name, and these modules.
        disk: where this adapter's tensors stand in files; the path unless PEFT nests wrappers.
    """

    path: str
    layer: nn.Module
    geometry: Geometry | None
    storage: Storage
    parameter: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    inner: str = ""
    target: str = ""
    label: str = ""
    times: int = 1
    disk: str = ""
    tied: Site | None = None
    shared: dict[str, list[nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.target = self.target or self.path
        self.disk = self.disk or self.path

    def weight(self) -> Tensor:
        """The base's own tensor, dense and in its layout, even while adapters are merged."""
        if self.tied is not None:
            return self.tied.weight()
        name, key = self.tensor_name, self.key
        if key in self.kept:
            return self.storage.read_kept(self.layer, self.kept[key], name)
        # Asked anew: the model may be sharded since, and its parts be together for one call.
        return slot_of(self.layer, name).read()

    @property
    def tensor_name(self) -> str:
        """Name of the base tensor that this site's adapters change."""
        return self.parameter or "weight"

    @property
    def key(self) -> str:
        """The same in the state dict of the module that is wrapped."""
        return self.key_of(self.tensor_name)

    def key_of(self, name: str) -> str:
        """A tensor of the layer by its name in the state dict of the module that is wrapped."""
        return f"{self.inner}.{name}" if self.inner else name

    @property
    def host_path(self) -> str:
        """Base path of the module that is wrapped."""
        return self.path.removesuffix(f".{self.inner}") if self.inner else self.path

    @property
    def rebinds(self) -> bool:
        """Whether adapters act by changing a tensor that some forward reads, beside no output."""
        return bool(self.inner or self.parameter)

    @property
    def takes_rows(self) -> bool:
        """Whether rows of one batch can have adapters of their own here."""
        if self.inner or HOSTS.find(type(self.layer)):
            return False  # several inputs, and the batch may be their second axis
        return self.geometry is None or self.geometry.tells_rows(self.layer)

    @property
    def device(self) -> torch.device:
        """Where the base layer's first tensor lives; new adapter tensors are made there."""
        for tensor in (*self.layer._parameters.values(), *self.layer._buffers.values()):
            if isinstance(tensor, Tensor):
                return tensor.device
        tensor = next(self.layer.parameters(), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that new adapter tensors take from the base layer."""
        own = self.layer._parameters.get(self.parameter) if self.parameter else None
        if own is not None and own.is_floating_point() and own.dtype.itemsize > 1:
            return own.dtype
        return self.storage.compute_dtype(self.layer) or torch.float32

    def __str__(self) -> str:
        return f"{self.path}.{self.parameter}" if self.parameter else self.path
