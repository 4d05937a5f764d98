"""Cases in float32, for variants of which PEFT decomposes the weight in float32 whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import MultigraftWarning
from tests.methods.against_peft import AgreesWithPeft, Case, filled, near
from tests.oracle import peft_state, quiet


class InSingle(nn.Module):
    """A model of `against_peft` with its batch in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layer = model.layer
        self.inner = [model]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input to a bounded function of its output."""
        return torch.tanh(self.layer(x))

    def batch(self) -> Tensor:
        """The model's own, narrower; a leaf with a gradient where it is floating point."""
        x = self.inner[0].batch()
        return x.detach().float().requires_grad_() if x.is_floating_point() else x


@dataclass(frozen=True)
class Single(Case):
    """A case whose base is in float32."""

    def model(self) -> Any:
        return InSingle(super().model().float()).eval()


class AgreesInSingle(AgreesWithPeft):
    """The same checks, without widening what was made in float32."""

    def both(self, case: Case) -> tuple[Any, Any]:
        ours, theirs = self.ours(case), self.theirs(case)
        state = filled(peft_state(theirs), self.noise)
        with quiet():
            peft.set_peft_model_state_dict(theirs, state)
        multigraft.set_peft_model_state_dict(ours, state)
        return ours, theirs

    def test_each_loads_what_the_other_saves(
        self, case: Case, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        ours, theirs = self.both(case)
        self.saved(ours, theirs, tmp_path)
        x = case.model().batch()
        with quiet():
            there = peft.PeftModel.from_pretrained(case.model(), tmp_path / "ours").eval()
        near(there(x), ours(x))
        recwarn.clear()
        here = multigraft.PeftModel.from_pretrained(case.model(), tmp_path / "theirs").eval()
        assert [w for w in recwarn if issubclass(w.category, MultigraftWarning)] == []
        near(here(x), theirs(x))
