"""One tensor of a base layer, found by its name in the layer's state dict.

    slot = slot_of(block, "mlp.0.weight")  # the weight of a layer inside `block`, in its storage

A merged adapter can change more than a weight: a bias, or everything that a module holds, buffers
and the tensors of modules inside it included. Each is read and written in the format in which it is
stored, by whoever holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from multigraft.storage.contract import Storage
from multigraft.whole import gathered, is_kept_by_deepspeed


@dataclass(frozen=True, eq=False)
class Slot:
    """A storage with its layer and tensor filled in; see `Storage` for what each verb means.

    Args:
        layer: the module that holds the tensor: the base layer, or one inside it.
        name: the tensor's name there.
    """

    storage: Storage
    layer: nn.Module
    name: str

    def refusal(self) -> str | None:
        """Why it cannot be written, and what to do; ``None`` when it can."""
        return self.storage.refusal(self.layer, self.name)

    def read(self) -> Tensor:
        """The dense values."""
        with gathered(self._kept()):
            value = self.storage.read(self.layer, self.name)
            return value.clone() if self._kept() else value

    def write(self, value: Tensor) -> None:
        """Store ``value``, rounded to the format."""
        with gathered(self._kept(), writes=True):
            self.storage.write(self.layer, value, self.name)

    def in_place(self) -> Tensor | None:
        """The tensor itself, where storing is nothing but copying into it."""
        return None if self._kept() else self.storage.in_place(self.layer, self.name)

    def keep(self) -> Any:
        """What restores the stored bits."""
        with gathered(self._kept()):
            return self.storage.keep(self.layer, self.name)

    def read_kept(self, kept: Any) -> Tensor:
        """What `read` gave when ``kept`` was kept."""
        return self.storage.read_kept(self.layer, kept, self.name)

    def give_back(self, kept: Any) -> None:
        """Restore exactly what `keep` saw."""
        with gathered(self._kept(), writes=True):
            self.storage.give_back(self.layer, kept, self.name)

    def _kept(self) -> list[Tensor]:
        """The tensor, if DeepSpeed keeps it and must be asked for its values."""
        held = self.layer._parameters.get(self.name)
        return [held] if held is not None and is_kept_by_deepspeed(held) else []
