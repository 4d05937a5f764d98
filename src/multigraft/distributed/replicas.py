"""Data parallel: every rank has the whole model and rows of its own, and all step alike.

    loss.backward()         each rank, its own rows
    replicas.reduce()       every gradient is now the mean of all ranks'
    optimizer.step()        so that all ranks make the same step

Adapters are small: their gradients go in a few large buckets after the backward pass, in an order
that does not depend on it. So nothing must be known beforehand of what a step trains: adapters may
be switched between steps, and a rank may lack rows of an adapter that others train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multigraft.containers import fetch
from multigraft.errors import TrainingError
from multigraft.roster import Roster
from multigraft.state import roster_of_model
from multigraft.whole import is_parted

BUCKET = 64 << 20
"""Bytes that go in one collective."""
SAMPLE = 64
"""Values of each of the base's tensors that ranks compare."""


class Replicas:
    """The ranks that hold the same model.

    Made on every rank, once the adapters are attached: they get rank 0's values.

    Args:
        model: a `PeftModel`, or a model that was adapted in place.
        group: the process group; the default one by default.

    Raises:
        StateError: the model has no adapters.
        TrainingError: the ranks do not hold the same base, or not the same adapters.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self.model = model
        self.group = group
        self.roster, _ = roster_of_model(model)
        self.size = dist.get_world_size(group)
        self._check_same()
        self.broadcast()

    @torch.no_grad()
    def broadcast(self) -> None:
        """Give all adapters the values that the group's first rank has; also after adding one."""
        self._agree(hash_of(_described(self.roster)), "have the same adapters on the same sites")
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        whole = [tensor for tensor in owned_tensors(self.roster) if not is_parted(tensor)]
        for bucket in buckets(whole):
            flat = flattened(bucket)
            dist.broadcast(flat, source, group=self.group)
            unflatten(flat, bucket)

    def reduce(
        self, scale: float | None = None, trained: Iterable[nn.Parameter] | None = None
    ) -> None:
        """Make every gradient the mean of the ranks' own.

        A parameter that no rank has a gradient of keeps none, so that optimisers leave it alone.
        Those that lie in parts are FSDP's to reduce.

        Args:
            scale: what the sum is multiplied by; one divided by the number of ranks by default.
            trained: whose gradients; those of every parameter that requires one by default.

        Raises:
            TrainingError: the ranks do not train the same parameters.
        """
        chosen = self.model.parameters() if trained is None else trained
        trained = [p for p in chosen if p.requires_grad and not is_parted(p)]
        has_some = self._with_gradients(trained)
        found = []
        for parameter in (p for p, has in zip(trained, has_some, strict=True) if has):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        self.sum(found, 1.0 / self.size if scale is None else scale)

    @torch.no_grad()
    def sum(self, tensors: Iterable[Tensor], scale: float = 1.0) -> None:
        """Make each tensor the sum of the ranks' own, times ``scale``, in place."""
        flying = []
        for bucket in buckets(tensors):
            flat = flattened(bucket)
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            flying.append((flat, bucket, work))
        for flat, bucket, work in flying:
            work.wait()
            unflatten(flat.mul_(scale) if scale != 1.0 else flat, bucket)

    def mean(self, value: float | Tensor) -> float:
        """The mean of a number that each rank has, such as its loss."""
        own = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        own = own.to(self._device())
        dist.all_reduce(own, group=self.group)
        return float(own) / self.size

    def _with_gradients(self, trained: list[nn.Parameter]) -> list[bool]:
        """Which of them any rank has a gradient of."""
        own = hash_of(f"{tuple(p.shape)}{p.dtype}" for p in trained)
        has = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        lacking = len(trained) - int(has.sum())
        most = self._agree(
            own, "train the same parameters (set_adapter() the same on all)", lacking
        )
        if not most:
            return [True] * len(trained)
        has = has.to(self._device())
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in has.tolist()]

    def _agree(self, own: int, what: str, count: int = 0) -> int:
        """Fail unless all ranks have the same number; the largest of their counts."""
        both = torch.tensor([own, -own, count], device=self._device())
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        if both[0] != -both[1]:
            raise TrainingError(
                f"rank {dist.get_rank()}: the {self.size} ranks do not all {what}. Attach, load "
                "and activate the same adapters in the same order on every rank."
            )
        return int(both[2])

    @torch.no_grad()
    def _check_same(self) -> None:
        """Fail where a rank has loaded another base, or drawn weights of its own."""
        own: list[str] = []
        for name, tensor in _base_tensors(self.roster):
            own.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}")
            if type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta:
                few = tensor.detach().reshape(-1)[:SAMPLE]
                own.append(str(few.to("cpu").double().tolist()))
        self._agree(hash_of(own), "hold the same base model, with the same values")

    def _device(self) -> torch.device:
        """Where the group's backend takes small tensors from."""
        backend = dist.get_backend(self.group)
        if "gloo" in backend or not torch.accelerator.is_available():
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator() or "cpu")


def owned_tensors(roster: Roster) -> list[Tensor]:
    """Every tensor of every adapter, each once, in an order that the model gives."""
    found: dict[int, Tensor] = {}
    for name in roster.configs:
        for _, graft in roster.grafts(name):
            for owner, leaf in graft.owners.values():
                tensor = fetch(owner, leaf)
                found[id(tensor)] = tensor
        context = roster.context_of(name)
        if context is not None:
            found |= {id(t): t for t in (*context.parameters(), *context.buffers())}
    return list(found.values())


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of one dtype and device, each of at most `BUCKET` bytes or one tensor."""
    filling: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for tensor in tensors:
        key = tensor.dtype, tensor.device
        if filling.get(key) and sizes[key] + tensor.nbytes > BUCKET:
            yield filling.pop(key)
        filling.setdefault(key, []).append(tensor)
        sizes[key] = tensor.nbytes + (sizes[key] if len(filling[key]) > 1 else 0)
    yield from filling.values()


def flattened(tensors: list[Tensor]) -> Tensor:
    """Their values in one."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    """Give them the values that `flattened` has put one behind another."""
    for tensor, own in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(own.view(tensor.shape))


def hash_of(texts: Iterable[str]) -> int:
    """A number of 62 bits that is the same on every rank for the same texts."""
    digest = hashlib.sha256("\n".join(texts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def _described(roster: Roster) -> Iterator[str]:
    for name in roster.configs:
        yield name
        for _, graft in roster.grafts(name):
            shapes = {n: tuple(fetch(*owner).shape) for n, owner in graft.owners.items()}
            yield f"{graft.site} {graft.method.name} {shapes}"


def _base_tensors(roster: Roster) -> Iterator[tuple[str, Tensor]]:
    own = {id(tensor) for tensor in owned_tensors(roster)}
    for tensors in (roster.root.named_parameters(), roster.root.named_buffers()):
        yield from ((name, tensor) for name, tensor in tensors if id(tensor) not in own)
