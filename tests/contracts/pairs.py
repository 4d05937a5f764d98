"""What the contract suite runs over: every registered method × geometry × storage.

    for pair in pairs():          # of all methods, or of those named
        subject = pair.subject()  # a small model with the pair's layer in it

A method is in by being registered: it runs with its config's defaults. What it wants to be tried
with besides stands in `OPTIONS`; a geometry's layer and input stand in `GEOMETRY_CASES`; storages
come from `tests.storage.cases`. Nothing here says what a method can do: its traits do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multigraft.bases.contract import GEOMETRIES
from multigraft.config import CONFIGS
from multigraft.methods import METHODS
from tests.storage.cases import CASES as STORAGES

SIZE = 64
ROWS = 4
TARGET = "target"
VOCABULARY = 20
INVOKED = (0, 3, None, 4)
"""Where each row of tokens holds an invocation."""

STARTS = [
    {"init_lora_weights": "loftq", "r": 4},
    {"init_lora_weights": "olora", "r": 4},
    {"init_lora_weights": "orthogonal", "r": 4},
    {"init_lora_weights": "pissa", "r": 4},
    {"init_lora_weights": "pissa", "r": 4, "use_dora": True},
]
"""Initialisations of LoRA that need nothing but the base."""

VARIANTS: list[dict[str, Any]] = [
    {"use_bdlora": {"target_modules_bd_a": [TARGET], "nblocks": 4}},
    {"use_bdlora": {"target_modules_bd_b": [TARGET], "nblocks": 2}},
    {"use_qalora": True, "qalora_group_size": 4},
    {"alora_invocation_tokens": [1, 2]},
    {"init_lora_weights": "mica", "r": 4},
    {"kasa_config": {}, "r": 3},
    {"monteclora_config": {"num_samples": 4, "buffer_size": 1}, "r": 4},
    {"velora_config": {"num_groups": 5}, "r": 4},
]
"""Variants of LoRA that need nothing but the layer."""

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "LORA": [
        {},
        {"use_rslora": True, "r": 4},
        {"lora_bias": True},
        {"use_dora": True},
        *VARIANTS,
        *STARTS,
    ],
    "BIAS": [{"bias": "lora_only"}],
    "SAVED_MODULE": [{"modules_to_save": [TARGET], "target_modules": ["other"]}],
    "IA3": [{"feedforward_modules": []}, {"feedforward_modules": [TARGET]}],
    "OFT": [
        {"oft_block_size": 8},
        {"oft_block_size": 8, "use_cayley_neumann": False, "block_share": True},
    ],
    "LOHA": [{"r": 4}, {"r": 4, "use_effective_conv2d": True}],
    "LOKR": [{"r": 4}, {"r": 2, "decompose_both": True}, {"use_effective_conv2d": True, "r": 2}],
    "VERA": [{"r": 8, "d_initial": 0.1}],
    "LN_TUNING": [{}],
    "TRAINABLE_TOKENS": [{"token_indices": [1, 3, 7]}],
    "TOKEN_ADAPTER": [
        {"trainable_token_indices": {TARGET: [1, 3, 7]}, "target_modules": ["other"]}
    ],
    "ADALORA": [{"total_step": 10, "init_r": 4, "target_r": 2}],
}
"""Options by method, beside ``target_modules``; one run of the suite for each."""

OWN_CONFIG = {"BIAS": "LORA", "SAVED_MODULE": "LORA", "TOKEN_ADAPTER": "LORA"}
"""Methods that ride on another's config."""


@dataclass(frozen=True)
class GeometryCase:
    """One kind of layer.

    Args:
        build: makes it, from the ambient random state.
        input: a batch of `ROWS` for it.
        targets: how a config names it.
    """

    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    targets: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": [TARGET]})


def _pixels(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(ROWS, SIZE, *sizes)


def _flat() -> Tensor:
    return torch.randn(ROWS, 3, SIZE)


class Experts(nn.Module):
    """A stack of weights that the forward reads, as mixtures of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 32, SIZE) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``, every expert in turn."""
        return torch.stack([x @ W.T for W in self.gate_up]).tanh().sum(0)


GEOMETRY_CASES: dict[str, GeometryCase] = {
    "linear": GeometryCase(lambda: nn.Linear(SIZE, 2 * SIZE), _flat),
    "conv1d_transposed": GeometryCase(lambda: Conv1D(2 * SIZE, SIZE), _flat),
    "conv1d": GeometryCase(lambda: nn.Conv1d(SIZE, 32, 3, padding=1), _pixels(5)),
    "conv2d": GeometryCase(lambda: nn.Conv2d(SIZE, 32, (3, 2), stride=(2, 1)), _pixels(5, 4)),
    "conv2d 1x1": GeometryCase(lambda: nn.Conv2d(SIZE, 32, 1), _pixels(3, 3)),
    "conv3d": GeometryCase(lambda: nn.Conv3d(SIZE, 32, (1, 2, 1)), _pixels(2, 3, 2)),
    "embedding": GeometryCase(lambda: nn.Embedding(20, SIZE), lambda: torch.randint(20, (ROWS, 5))),
    "attention": GeometryCase(lambda: nn.MultiheadAttention(SIZE, 4, batch_first=True), _flat),
    "experts": GeometryCase(
        Experts, _flat, {"target_modules": ["other"], "target_parameters": [f"{TARGET}.gate_up"]}
    ),
    "norm": GeometryCase(lambda: nn.LayerNorm(SIZE), _flat),
}
ELSEWHERE = {
    "megatron_column": "tests/bases/test_megatron.py",
    "megatron_row": "tests/bases/test_megatron.py",
}
"""Geometries of packages that no index has; stand-ins are built where their own tests are."""
ONLY_DENSE = ("float32", "bfloat16")
"""Storages that are tried with other kinds of layers than linear ones."""


class Subject(nn.Module):
    """The pair's layer as `target`, and `other`, which the forward passes by.

    Args:
        words: what stands for tokens, ``(tokens, SIZE)``, when the model is given those.
    """

    def __init__(self, layer: nn.Module, words: Tensor | None = None) -> None:
        super().__init__()
        self.target = layer
        self.other = nn.Linear(4, 4)
        self.inputs = 3 if isinstance(layer, nn.MultiheadAttention) else 1
        self.register_buffer("words", words)

    def seen(self, x: Tensor) -> Tensor:
        """What the layer sees of the model's input."""
        return x if self.words is None else self.words[x]

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the layer takes to what it gives; an attention attends to its own input."""
        y = self.target(*(self.seen(x),) * self.inputs)
        return y[0] if isinstance(y, tuple) else y


@dataclass(frozen=True)
class Pair:
    """One method with one set of options on one kind of layer in one storage."""

    method: str
    geometry: str
    storage: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.options.items() if k != "target_modules")
        return f"{self.method}({shown})-{self.geometry}-{self.storage}"

    @property
    def peft_type(self) -> str:
        """Whose config makes this method act."""
        return OWN_CONFIG.get(self.method, self.method)

    @property
    def invocation(self) -> list[int]:
        """Tokens that the adapter waits for; the model is given tokens then."""
        return list(self.options.get("alora_invocation_tokens", ()))

    @property
    def dtype(self) -> torch.dtype:
        """What inputs take."""
        return STORAGES[self.storage].dtype

    def kwargs(self) -> dict[str, Any]:
        """The config's arguments, for this library and for PEFT."""
        targets = GEOMETRY_CASES[self.geometry].targets
        return copy.deepcopy({**targets, **self.options})

    def subject(self, seed: int = 0) -> Subject:
        """A fresh model, the same for the same seed."""
        torch.manual_seed(seed)
        layer = GEOMETRY_CASES[self.geometry].build()
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.normal_(bias, std=0.3)
        stored = STORAGES[self.storage].build(layer)  # type: ignore[arg-type]
        words = torch.randn(VOCABULARY, SIZE).to(self.dtype) if self.invocation else None
        return Subject(stored, words).requires_grad_(False).eval()

    def input(self, seed: int = 1) -> Tensor:
        """A batch of `ROWS`."""
        torch.manual_seed(seed)
        if self.invocation:
            ids = torch.randint(max(self.invocation) + 1, VOCABULARY, (ROWS, 6))
            for row, start in enumerate(INVOKED):
                if start is not None:
                    ids[row, start : start + len(self.invocation)] = torch.tensor(self.invocation)
            return ids
        x = GEOMETRY_CASES[self.geometry].input()
        return x.to(self.dtype) if x.is_floating_point() else x

    @property
    def rounding(self) -> float:
        """Relative size of one rounding of the outputs."""
        return torch.finfo(self.dtype).eps


def rows(*methods: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, options) of these methods, or of all."""
    for method in methods or [name for name, _ in METHODS.items()]:
        for options in OPTIONS.get(method, [{}]):
            yield method, options


def pairs(*methods: str) -> Iterator[Pair]:
    """Every pair of these methods, or of all."""
    for method, options in rows(*methods):
        config = CONFIGS[OWN_CONFIG.get(method, method)]
        for geometry, case in GEOMETRY_CASES.items():
            if not case.targets.keys() <= {f.name for f in fields(config)}:
                continue  # the method's files cannot name this kind of layer
            for storage in STORAGES if geometry == "linear" else ONLY_DENSE:
                yield Pair(method, geometry, storage, options)


def uncovered() -> set[str]:
    """Names of registered geometries that no case above builds."""
    from multigraft.bases import geometry_of

    torch.manual_seed(0)
    found = (geometry_of(case.build()) for case in GEOMETRY_CASES.values())
    built = {g.name for g in found if g is not None} | ELSEWHERE.keys()
    return {g.name for _, g in GEOMETRIES.items()} - built
