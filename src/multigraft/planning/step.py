"""One training step on the meta device: every storage that is alive, at every moment.

    optimiser's state ──> forward ──> loss ──> backward ──> optimiser

The step is run, operator by operator, on tensors without memory, and what autograd keeps is what
it keeps: no formula by architecture. A test holds the result to steps with memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import MultigraftError, UnsupportedError
from multigraft.planning.kernels import KernelsOf
from multigraft.planning.ledger import (
    BACKWARD,
    FORWARD,
    LOSS,
    START,
    UPDATE,
    Ledger,
    peak_of,
    totals,
)

BASE = "base weights"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimiser state"
ACTIVATIONS = "activations"
LOSSES = "logits and loss"
TEMPORARY = "temporary"
PARTS = (BASE, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSSES, TEMPORARY)
"""What memory goes to, in the order of a table."""
BY_PHASE = {
    START: BASE,
    FORWARD: ACTIVATIONS,
    LOSS: LOSSES,
    BACKWARD: TEMPORARY,
    UPDATE: TEMPORARY,
}

Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch], Tensor]
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Step:
    """What a step came to.

    Args:
        events: (number of a storage, bytes), negative when it goes.
        part_of: the part that each storage belongs to, by number.
        kept: bytes that the forward pass leaves for the backward pass.
        flops: floating-point operations of products and attention.
    """

    events: Sequence[tuple[int, int]]
    part_of: Sequence[str]
    kept: int
    flops: int = 0

    @property
    def course(self) -> list[int]:
        """Bytes alive after each event."""
        return totals(self.events)

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[str, int]:
        """What those bytes belong to; `PARTS`, each of them."""
        found = dict.fromkeys(PARTS, 0)
        for number, size in peak_of(self.events).items():
            found[self.part_of[number]] += size
        return found


def run_step(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    batch: Batch,
    loss: Loss,
    optimizer: MakeOptimizer,
    *,
    device: str = "cuda",
    accumulates: bool = False,
) -> Step:
    """The second of two like steps, when the optimiser's state is there.

    Args:
        model: in the mode that it is to run in, on the meta device.
        trained: what gets gradients.
        batch: the model's arguments.
        loss: of the model's outputs, a scalar.
        optimizer: makes it of ``trained``.
        device: whose kernels are counted with, ``"cpu"`` or ``"cuda"``.
        accumulates: gradients of earlier parts of the batch are there when this one begins.

    Raises:
        UnsupportedError: the model's forward depends on values, which there are none of.
    """
    ledger = Ledger()
    ledger.hold([*model.parameters(), *model.buffers(), *_tensors(batch)])
    own = ledger.numbers(trained)
    with ledger, KernelsOf(device):
        made = optimizer(trained)
        ledger.phase = UPDATE
        _set_gradients(trained, True)
        made.step()
        _set_gradients(trained, accumulates)
        begins = len(ledger.events)
        ledger.phase = FORWARD
        outputs = _told(model, batch)
        logits = ledger.numbers(_results(outputs))
        outputs_alone = sum(ledger.live[number] for number in logits)
        kept = sum(n for i, n in ledger.live.items() if ledger.made_in[i] == FORWARD)
        ledger.phase = LOSS
        value = loss(outputs, batch)
        del outputs
        ledger.phase = BACKWARD
        _backward(value)
        del value
        gradients = ledger.numbers(p.grad for p in trained if p.grad is not None)
        ledger.phase = UPDATE
        made.step()
    state = ledger.numbers(_tensors(list(made.state.values())))
    _set_gradients(trained, False)
    parts = [BY_PHASE[phase] for phase in ledger.made_in]
    named = ((own, ADAPTERS), (gradients, GRADIENTS), (state, OPTIMIZER), (logits, LOSSES))
    for numbers, name in named:
        for number in numbers:
            parts[number] = name
    flops = sum(ledger.flops)
    return Step(_from(ledger.events, begins), parts, kept - outputs_alone, flops)


def _from(events: Sequence[tuple[int, int]], begins: int) -> list[tuple[int, int]]:
    """The events from there on, after what is alive by then."""
    alive: dict[int, int] = {}
    for number, change in events[:begins]:
        if change < 0:
            alive.pop(number, None)
        else:
            alive[number] = change
    return [*alive.items(), *events[begins:]]


def _told(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs; what it trips over is said."""
    try:
        return model(**batch)
    except MultigraftError:
        raise
    except Exception as error:  # whatever an architecture does with tensors without values
        base = getattr(model, "get_base_model", lambda: model)()
        raise UnsupportedError(
            f"{type(base).__name__}: its forward cannot be run on tensors without values "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}), so "
            "its memory cannot be planned."
        ) from error


def _set_gradients(parameters: Sequence[nn.Parameter], have: bool) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if have else None


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, in which `KernelsOf` stays entered for a checkpoint's second run."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
        accumulate_grad=True,
    )  # fmt: skip


def _results(outputs: Any) -> list[Tensor]:
    """Of a model's outputs, what the loss is made of; the rest is what its graph keeps anyway."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return [found]
    return _tensors(outputs)


def _tensors(value: Any) -> list[Tensor]:
    """Those in mappings, sequences and outputs of transformers."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
