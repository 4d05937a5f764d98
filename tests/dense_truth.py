"""What an adapted model must be, said densely: base tensors plus the effective adapters' changes.

Nothing here asks the library. An adapter is a list of sites and its own tensors by name on disk;
its change of the base is computed from those in a few lines of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Net(nn.Module):
    """Every geometry, and one layer at two places. Ids (batch, tokens) to (batch, tokens, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.twin = nn.Linear(6, 6)
        self.alias = self.twin
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.emb(ids))))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.alias(torch.tanh(self.twin(x))))


def run(t: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """`Net.forward` with these tensors."""
    x = torch.tanh(F.linear(F.embedding(ids, t["emb.weight"]), t["up.weight"], t["up.bias"]))
    x = F.layer_norm(x, (8,), t["norm.weight"], t["norm.bias"])
    x = F.conv1d(x.transpose(1, 2), t["conv.weight"], t["conv.bias"], padding=1).transpose(1, 2)
    x = torch.tanh(F.linear(x, t["twin.weight"], t["twin.bias"]))
    return F.linear(F.linear(x, t["twin.weight"], t["twin.bias"]), t["head.weight"], t["head.bias"])


@dataclass(frozen=True)
class Kind:
    """One way to configure an adapter, and what it must turn out to mean on `Net`.

    Args:
        options: of `LoraConfig`.
        lora, saved, biases: the paths where it must act.
    """

    options: dict[str, Any]
    lora: tuple[str, ...]
    saved: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()

    @property
    def paths(self) -> set[str]:
        """Where this adapter needs a wrapper."""
        return {*self.lora, *self.saved, *self.biases}

    @property
    def scaling(self) -> float:
        """What the paper says."""
        alpha, r = self.options["lora_alpha"], self.options["r"]
        return alpha / (math.sqrt(r) if self.options.get("use_rslora") else r)

    def keys(self) -> set[str]:
        """Names on disk, relative to the base model."""
        keys = {f"{p}.{leaf}" for p in self.saved for leaf in LEAVES[p]}
        keys |= {f"{p}.base_layer.bias" if p in self.lora else f"{p}.bias" for p in self.biases}
        for path in self.lora:
            a, b = FACTORS.get(path, ("lora_A.weight", "lora_B.weight"))
            keys |= {f"{path}.{a}", f"{path}.{b}"}
            if self.options.get("lora_bias"):
                keys.add(f"{path}.lora_B.bias")
        return keys


FACTORS = {"emb": ("lora_embedding_A", "lora_embedding_B")}
LEAVES = {"emb": ("weight",), "norm": ("weight", "bias"), "head": ("weight", "bias")}

KINDS = {
    "all-linear": Kind(
        {"target_modules": "all-linear", "r": 2, "lora_alpha": 4}, ("up", "twin", "head")
    ),
    "list, rslora": Kind(
        {"target_modules": ["conv", "head"], "r": 3, "lora_alpha": 2, "use_rslora": True},
        ("conv", "head"),
    ),
    "regex": Kind(
        {"target_modules": r"(up|tw\w+)", "r": 1, "lora_alpha": 1, "init_lora_weights": "gaussian"},
        ("up", "twin"),
    ),
    "second name of a shared layer": Kind(
        {"target_modules": ["alias"], "r": 2, "lora_alpha": 3, "init_lora_weights": False},
        ("twin",),
    ),
    "embedding and convolution": Kind(
        {"target_modules": ["emb", "conv"], "r": 2, "lora_alpha": 2, "init_lora_weights": False},
        ("emb", "conv"),
    ),
    "saved head": Kind(
        {"target_modules": ["up"], "r": 2, "lora_alpha": 2, "modules_to_save": ["head"]},
        ("up",),
        saved=("head",),
    ),
    "all-linear but a saved head": Kind(
        {"target_modules": "all-linear", "r": 1, "lora_alpha": 2, "modules_to_save": ["head"]},
        ("up", "twin"),
        saved=("head",),
    ),
    "saved norm and embedding": Kind(
        {"target_modules": ["head"], "r": 2, "lora_alpha": 1, "modules_to_save": ["norm", "emb"]},
        ("head",),
        saved=("norm", "emb"),
    ),
    "all biases": Kind(
        {"target_modules": ["up"], "r": 2, "lora_alpha": 2, "bias": "all"},
        ("up",),
        biases=("up", "norm", "conv", "twin", "head"),
    ),
    "own biases": Kind(
        {"target_modules": ["twin", "conv"], "r": 2, "lora_alpha": 2, "bias": "lora_only"},
        ("twin", "conv"),
        biases=("twin", "conv"),
    ),
    "bias of B": Kind(
        {"target_modules": ["head", "up"], "r": 2, "lora_alpha": 2, "lora_bias": True},
        ("head", "up"),
    ),
}


@dataclass
class Change:
    """One adapter's change of the base: tensors that it replaces, and what it adds to others."""

    replaced: Tensors = field(default_factory=dict)
    added: Tensors = field(default_factory=dict)

    def detached(self) -> Change:
        """The same values, for good."""
        return Change(
            {k: v.detach().clone() for k, v in self.replaced.items()},
            {k: v.detach().clone() for k, v in self.added.items()},
        )


@dataclass
class Record:
    """One adapter as it must be: its kind, its tensors, its scaling per site, its flag."""

    kind: Kind
    tensors: Tensors
    scaling: dict[str, float]
    trains: bool

    def change(self, base: Mapping[str, Tensor], tensors: Tensors | None = None) -> Change:
        """What it changes of ``base``, with these tensors or its own."""
        t = self.tensors if tensors is None else tensors
        change = Change({f"{p}.{x}": t[f"{p}.{x}"] for p in self.kind.saved for x in LEAVES[p]})
        for path in self.kind.lora:
            change.added[f"{path}.weight"] = self.scaling[path] * _product(path, t)
            if f"{path}.lora_B.bias" in t:
                change.added[f"{path}.bias"] = self.scaling[path] * t[f"{path}.lora_B.bias"]
        for path in self.kind.biases:
            key = f"{path}.base_layer.bias" if path in self.kind.lora else f"{path}.bias"
            change.added[f"{path}.bias"] = t[key] - base[f"{path}.bias"]
        return change


def together(base: Mapping[str, Tensor], changes: Iterable[Change]) -> Tensors:
    """The base's tensors with these changes, each relative to the base's own values."""
    changes = list(changes)
    values = dict(base)
    for change in changes:
        values |= change.replaced
    for change in changes:
        for key, delta in change.added.items():
            values[key] = values[key] + delta
    return values


def _product(path: str, t: Mapping[str, Tensor]) -> Tensor:
    if path == "emb":
        return (t["emb.lora_embedding_B"] @ t["emb.lora_embedding_A"]).T
    A, B = t[f"{path}.lora_A.weight"], t[f"{path}.lora_B.weight"]
    return torch.einsum("or,ri...->oi...", B.flatten(1), A)
