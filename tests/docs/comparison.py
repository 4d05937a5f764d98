"""What docs/coming-from-peft.md is held to: for each of its rows, what either library does.

A row is a function of the library; what it returns or raises is compared with what the row expects
of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import multigraft
from tests.oracle import llama as llama
from tests.oracle import quiet as quiet

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Raises:
    """An error of this type (or a subclass), whose message holds this text."""

    kind: type[BaseException]
    text: str = ""

    def covers(self, error: BaseException) -> bool:
        return isinstance(error, self.kind) and self.text in str(error)


@dataclass(frozen=True)
class Row:
    """A row of the page: its topic, how to find out, and what is expected of each library."""

    topic: str
    find: Callable[..., Any]
    peft: Any
    ours: Any


ROWS: list[Row] = []


def row(topic: str, *, peft: Any, ours: Any) -> Callable[[Callable[..., Any]], None]:
    """Register a function of (library, folder) as the proof of a row."""

    def register(find: Callable[..., Any]) -> None:
        ROWS.append(Row(topic, find, peft, ours))

    return register


def topics(page: Path) -> list[str]:
    """The first cells of the page's rows of four cells."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    cells = [cells[0].strip() for cells in rows if len(cells) == 4]
    return [cell for cell in cells if cell and not set(cell) <= {"-", ":"}]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """(batch, 8) to (batch, 4); with a name that ends like another one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 4)
        self.overhead = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.overhead(self.head(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def config(library: Any, target: Any = "all-linear", **options: Any) -> Any:
    """A LoRA config whose adapter acts from the start."""
    options = {"r": 2, "init_lora_weights": False, **options}
    return library.LoraConfig(target_modules=target, **options)


def graft(
    library: Any, target: Any = "all-linear", name: str = "a", base: Any = None, **options: Any
) -> Any:
    """A base (`net` by default) with one adapter, in evaluation mode."""
    base = net() if base is None else base
    made = library.get_peft_model(base, config(library, target, **options), adapter_name=name)
    return made.eval()


def graft_two(library: Any, target: Any = "all-linear", **options: Any) -> Any:
    """Adapters `a` and `b`, alike, of which `a` is active."""
    model = graft(library, target, **options)
    model.add_adapter("b", config(library, target, **options))
    return model.eval()


def adapted(model: nn.Module) -> list[str]:
    """Base paths that carry a LoRA."""
    names = [n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n]
    return sorted({name.removeprefix("base_model.model.") for name in names})


def layers(model: nn.Module) -> list[Any]:
    """The library's wrappers."""
    return [m for m in model.modules() if hasattr(m, "set_scale")]


def merged(model: nn.Module) -> list[str]:
    return list(layers(model)[0].merged_adapters)


def flags(model: nn.Module, adapter: str = "") -> list[bool]:
    """`requires_grad` of all parameters, or of one adapter's LoRA tensors."""
    named = model.named_parameters()
    return [p.requires_grad for n, p in named if not adapter or f".{adapter}." in n]


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def saved(
    folder: Path,
    edit: Callable[[dict[str, Tensor]], Any] | None = None,
    base: Any = None,
    **options: Any,
) -> Path:
    """A file of ours with one adapter, its tensors edited."""
    graft(multigraft, name="default", base=base, **options).save_pretrained(folder)
    if edit is not None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def load(library: Any, folder: Path, base: Any = None, **options: Any) -> Any:
    return library.PeftModel.from_pretrained(net() if base is None else base, folder, **options)
