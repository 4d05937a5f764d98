"""What a call told its layers is there when a checkpointed block runs again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import multigraft
from multigraft import LoraConfig
from multigraft.recomputation import CHECKPOINT, remembered


class Block(nn.Module):
    """A block that is a checkpoint in training, as transformers' are."""

    gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.__dict__[CHECKPOINT] = self.run

    @staticmethod
    def run(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, 4)`` to the same."""
        return self.__dict__[CHECKPOINT](lambda x: self.inner(x).tanh(), x)


def model() -> multigraft.PeftModel:
    """Two blocks and two filled adapters that train."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["inner"])
    found = multigraft.get_peft_model(nn.Sequential(Block(), Block()), config, "a")
    found.add_adapter("b", config)
    found.base_model.set_requires_grad(["a", "b"])
    with torch.no_grad():
        for name in ("a", "b"):
            for parameter in found.roster.parameters(name):
                parameter.normal_()
    return found


def grads(peft_model: multigraft.PeftModel) -> dict[str, Tensor]:
    return {n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None}


def test_a_mixed_batch_trains_each_adapter_on_its_own_rows() -> None:
    mixed, x = model(), torch.randn(3, 4)
    for block in mixed.get_base_model():  # type: ignore[attr-defined]
        block.__dict__[CHECKPOINT] = lambda function, *args: function(*args)
    mixed(x, adapter_names=["a", "b", "a"]).sum().backward()
    again = model()
    again(x, adapter_names=["a", "b", "a"]).sum().backward()
    expected, found = grads(mixed), grads(again)
    assert expected.keys() == found.keys() and len(found) == 8
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("kind", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_torchs_own_wrapper_of_checkpoints_is_served(kind: CheckpointImpl) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    found = []
    for is_checkpoint in (False, True):
        torch.manual_seed(0)
        blocks: list[nn.Module] = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
        if is_checkpoint:
            blocks = [checkpoint_wrapper(block, kind) for block in blocks]
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        mixed = multigraft.get_peft_model(nn.Sequential(*blocks), config, "a")
        mixed.add_adapter("b", config)
        mixed.base_model.set_requires_grad(["a", "b"])
        mixed(x, adapter_names=["a", "b", "a"]).sum().backward()
        found.append(list(grads(mixed).values()))
    assert len(found[0]) == len(found[1]) == 8
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_blocks_are_as_they_were_after_the_call() -> None:
    peft_model = model()
    blocks = list(peft_model.get_base_model())  # type: ignore[call-overload]
    before = [block.__dict__[CHECKPOINT] for block in blocks]
    with remembered(peft_model.roster):
        assert [block.__dict__[CHECKPOINT] for block in blocks] != before
    assert [block.__dict__[CHECKPOINT] for block in blocks] == before


def test_nothing_is_wrapped_where_no_gradient_is_wanted() -> None:
    peft_model = model()
    block = peft_model.get_base_model()[0]  # type: ignore[index]
    before = block.__dict__[CHECKPOINT]
    with torch.no_grad(), remembered(peft_model.roster):
        assert block.__dict__[CHECKPOINT] is before


def test_a_copy_that_stands_in_for_a_block_is_remembered_while_it_acts() -> None:
    base = nn.Sequential(Block(), Block())
    base[1].gain = nn.Parameter(torch.ones(1))  # or it would be saved by its parts
    found = multigraft.get_peft_model(base, LoraConfig(r=2, target_modules=["0.inner"]), "a")
    found.add_adapter("c", LoraConfig(r=2, target_modules=["0.inner"], modules_to_save=["1"]))
    block = base[1].modules_to_save["c"]
    own = block.__dict__[CHECKPOINT]
    with remembered(found.roster):
        assert block.__dict__[CHECKPOINT] is own
    found.set_adapter("c")
    with remembered(found.roster):
        assert block.__dict__[CHECKPOINT] is not own
    assert block.__dict__[CHECKPOINT] is own


def test_modules_of_adapters_are_not_looked_at() -> None:
    from multigraft.recomputation import _blocks

    found = model()
    count = len(list(_blocks(found.roster)))
    for name in "cdef":
        found.add_adapter(name, LoraConfig(r=2, target_modules=["inner"]))
    assert len(list(_blocks(found.roster))) == count
