"""PEFT's LoftQ, which asks for a GPU and for scipy by name and needs neither."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch


def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``.to("cuda")`` stays on the CPU, and scipy is believed to be there."""
    for cls in (torch.Tensor, bnb.nn.Params4bit, bnb.nn.Int8Params):
        monkeypatch.setattr(cls, "to", _on_cpu(cls.to))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: object() if name == "scipy" else find(name, *a),
    )


def _on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if str(x).startswith("cuda") else x for x in args)
        kwargs = {n: "cpu" if str(x).startswith("cuda") else x for n, x in kwargs.items()}
        return to(self, *args, **kwargs)

    return moved
