"""Adapters that nobody needs now wait on the CPU; the accelerator holds the most recently used.

    keep_cold_on_cpu(model, most=8)         from now on, of however many there are
    model(**batch, adapter_names=[...])     what a call names is brought first, and others make room

What acts, trains or is merged stays where its layers are. Parameters keep their identity, and only
their memory moves; pinned, where the accelerator can copy from that while it computes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from multigraft.containers import fetch, hold
from multigraft.errors import ConfigError, StateError
from multigraft.roster import Roster
from multigraft.state import roster_of_model


class Residency:
    """Which of a model's adapters are where their layers are, least recently used first.

    Args:
        most: how many there may be, unless more are needed at once.
        home: where the others wait.
    """

    def __init__(self, roster: Roster, most: int, home: torch.device) -> None:
        self.roster, self.most, self.home = roster, most, home
        self.resident: dict[str, None] = {}

    def need(self, names: Iterable[str]) -> None:
        """Bring these adapters to their layers, and send others home where there are too many."""
        wanted = [name for name in dict.fromkeys(names) if name in self.roster.configs]
        for name in wanted:
            if name not in self.resident:
                self._move(name, None)
            self.resident.pop(name, None)
            self.resident[name] = None
        self.make_room(wanted)

    def make_room(self, wanted: Iterable[str] = ()) -> None:
        """Send the least recently used home that nobody needs, until few enough are left."""
        self.resident = {n: None for n in self.resident if n in self.roster.configs}
        stays = {*wanted, *self.roster.active, *self.roster.merged}
        for name in list(self.resident):
            if len(self.resident) <= self.most:
                return
            if name not in stays and not self.roster.trains(name):
                self._move(name, self.home)
                del self.resident[name]

    def arrive(self, name: str) -> None:
        """Note an adapter that was made where its layers are."""
        self.resident[name] = None
        self.make_room()

    def release(self) -> None:
        """Bring all back, for good."""
        for name in self.roster.configs:
            if name not in self.resident:
                self._move(name, None)
        self.roster.residency = None

    def _move(self, name: str, device: torch.device | None) -> None:
        """Move an adapter's tensors; to their layers' devices when none is given."""
        self.roster.forget_stacks()
        for _, graft in self.roster.grafts(name):
            for owner, leaf in graft.owners.values():
                relocate(owner, leaf, device or graft.site.device)


def keep_cold_on_cpu(model: nn.Module, most: int, home: str | torch.device = "cpu") -> Residency:
    """Let adapters wait on the CPU until they are needed; see this module.

    Args:
        model: a `PeftModel`, or a model adapted in place.
        most: how many adapters stay on the accelerator at most, unless more are needed at once.
        home: where the others wait.

    Returns:
        What decides it; ``.release()`` brings all back.

    Raises:
        ConfigError: ``most`` is no number of at least 1.
        StateError: the model has no adapters, or does this already.
    """
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ConfigError(f"`most` (={most!r}) must be a number of adapters, at least 1.")
    roster, _ = roster_of_model(model)
    if roster.residency is not None:
        raise StateError("adapters wait on the CPU already; call .release() of that first.")
    found = roster.residency = Residency(roster, most, torch.device(home))
    found.resident = dict.fromkeys([*roster.configs, *roster.active])
    found.need(roster.active)
    return found


def relocate(owner: nn.Module, leaf: str, device: torch.device) -> None:
    """Move one tensor; a parameter stays the object that it is."""
    tensor = fetch(owner, leaf)
    if tensor.device == device:
        return
    moved = _moved(tensor.detach(), device)
    if isinstance(tensor, nn.Parameter):
        tensor.data = moved
    else:
        hold(owner, leaf, moved)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())
    moved = tensor.to(device)
    return moved.pin_memory() if torch.accelerator.is_available() else moved
