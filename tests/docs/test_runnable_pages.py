"""Pages whose Python runs as written, from top to bottom."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Net(nn.Module):
    """The base of the pages' examples."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 8)`` to ``(batch, 8)``."""
        return self.down(torch.tanh(self.up(x)))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def train(model: Any, optimizer: Any = None) -> None:
    """Steps of the optimiser; without one, random values in every adapter."""
    if optimizer is None:
        with torch.no_grad():
            for parameter in (
                p for name in model.peft_config for p in model.roster.parameters(name)
            ):
                parameter.normal_(std=0.3)
        return
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def run(page: str) -> dict[str, Any]:
    """Run the page's blocks one after another; returns their names."""
    torch.manual_seed(0)
    base = Net().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    names: dict[str, Any] = {"base": base, "tuned": tuned, "train": train, "x": X}
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)
    return names


def test_combining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("combining.md")
    model, printed = names["model"], capsys.readouterr().out
    assert {"both", "less_code", "small", "loha", "calm_code"} <= model.peft_config.keys()
    assert model.active_adapters == ["calm_code"]
    assert re.search(r"^up \d \d+\.\d%$", printed, re.MULTILINE)
    assert names["found"].left_out == [] and 0 < names["found"].error < 0.32
    assert (tmp_path / "as-lora" / "adapter_model.safetensors").is_file()
    assert not torch.equal(names["halfway"], names["base"](X))


def test_optimizers() -> None:
    names = run("optimizers.md")
    assert type(names["optimizer"]) is torch.optim.AdamW
    assert all(p.requires_grad for p in names["model"].roster.parameters("default"))
