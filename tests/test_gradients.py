"""Gradient checkpointing of a base whose embeddings are frozen by its adapters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multigraft import LoraConfig, MultigraftWarning, get_peft_model
from tests import oracle
from tests.oracle import build


class Checkpointed(nn.Module):
    """A base that checkpoints reentrantly and knows transformers' flag, but not its remedy."""

    is_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.lin = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.lin, self.emb(ids), use_reentrant=True)
        return result


CONFIG = LoraConfig(target_modules=["lin"], r=1)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_a_base_that_checkpoints_and_cannot_let_gradients_in_is_warned_of() -> None:
    with pytest.warns(MultigraftWarning, match="has no enable_input_require_grads"):
        get_peft_model(Checkpointed(), CONFIG)


def test_a_base_that_does_not_checkpoint_gets_no_hook_and_no_warning() -> None:
    base = Checkpointed()
    base.is_gradient_checkpointing = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(base, CONFIG)
    assert hooks(base) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_the_first_layers_adapter(reentrant: bool) -> None:
    base: Any = build(oracle.llama)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).train()
    model(**oracle.inputs(model))[0].sum().backward()
    factors = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B
    assert float(factors["default"].weight.grad.abs().max()) > 0


def test_what_transformers_has_seen_to_is_not_done_twice() -> None:
    base: Any = build(oracle.llama)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    before = hooks(base)
    for name in ("a", "b"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"]), name)
    assert hooks(base) == before
