"""The plan of a whole run, as `multigraft train` would make it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multigraft.planning.optimizers import maker
from multigraft.planning.request import Request

if TYPE_CHECKING:
    from multigraft.train import Job


def request_of(job: Job, *, memory: str | int | None = None, gpus: int = 1) -> Request:
    """What a step of this run takes, with every adapter of it.

    Packed rows and the longest examples have ``max_length`` tokens. Adapters that differ in
    ``accumulate`` or ``optimizer`` are planned with what takes the most of them.

    Args:
        job: a run, such as `multigraft.train.spec.job_of` makes of a file.
        memory: bytes, or text such as ``"80GiB"``.
        gpus: processes that share each batch's rows; tensor parallelism shares none.
    """
    sharing = 1 if job.strategy == "tp" else gpus
    recipes = {adapter.name: adapter.recipe for adapter in job.adapters}
    return Request(
        model=job.model,
        adapters={adapter.name: adapter.config for adapter in job.adapters},
        batch_size=_one({n: -(-r.batch_size // sharing) for n, r in recipes.items()}),
        max_length=_one({adapter.name: adapter.max_length for adapter in job.adapters}),
        dtype="float32" if job.device == "cpu" and job.dtype == "auto" else job.dtype,
        quantize=job.quantize,
        optimizer=_largest({recipe.optimizer for recipe in recipes.values()}),
        gradient_checkpointing=job.gradient_checkpointing,
        accumulate=max(recipe.accumulate for recipe in recipes.values()),
        device="cpu" if job.device == "cpu" else "cuda",
        memory=memory,
        task=job.task.name,
    )


def _one(values: dict[str, int]) -> Any:
    """One number where all are alike."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def _largest(names: set[str]) -> str:
    """The optimiser whose state takes the most."""
    import torch

    def size(name: str) -> int:
        parameter = torch.nn.Parameter(torch.empty(1 << 16, device="meta"))
        parameter.grad = torch.empty_like(parameter)
        made = maker(name)([parameter])
        made.step()
        state = made.state[parameter].values()
        return sum(value.nbytes for value in state if isinstance(value, torch.Tensor))

    return max(sorted(names), key=size) if len(names) > 1 else next(iter(names))
