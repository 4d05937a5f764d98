"""What the benchmarks share: the two libraries, the models, processes of their own.

    for arm in ARMS:
        measured = in_process("attach.py", arm, "llama")   # runs `worker` there, returns its JSON

Each library runs in processes of its own where state counts (attaching, files): neither pays for
the other's imports. They take turns, so that a busy moment of the machine falls on both. The
garbage collector runs as users have it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, Report
from torch import nn

ARMS = ("multigraft", "peft")
BENCH = Path(__file__).resolve().parent
INNER, LAYERS, HEADS, VOCABULARY = 1408, 8, 8, 1000
THREADS = int(os.environ.get("BENCH_THREADS", "1"))
torch.set_num_threads(THREADS)

TOUCHED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment of a process that keeps the memory it frees; with `touch_memory`, later allocations
cost no page fault. A fault takes 1 to 20 µs on virtual machines and both libraries need the same
pages, so that they hide what a library's own work grows by."""


def touch_memory(mebibytes: int) -> None:
    """Have the system hand over this much memory now; see `TOUCHED`."""
    torch.ones(mebibytes * 2**18)


def library(arm: str) -> Any:
    """The package, silenced: it is timed, not read."""
    warnings.simplefilter("ignore")
    return importlib.import_module(arm)


def config(arm: str, **options: Any) -> Any:
    """The LoRA that every benchmark attaches: rank 8 on every linear layer but the head."""
    return library(arm).LoraConfig(**{"r": 8, "target_modules": "all-linear", **options})


def llama(hidden: int = 512, layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The issue's model: 8 layers of hidden size 512, 56 linear layers besides the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * INNER // 512,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(shape).to(dtype)


class Wide(nn.Module):
    """Nothing but many linear layers, seven to a block as in a Llama; it is never run."""

    def __init__(self, linears: int, size: int = 32) -> None:
        super().__init__()
        blocks = linears // 7
        self.blocks = nn.ModuleList(
            nn.ModuleDict({f"linear_{i}": nn.Linear(size, size) for i in range(7)})
            for _ in range(blocks)
        )


class Stack(nn.Module):
    """A few large linear layers, one after the other."""

    def __init__(self, layers: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(layers)
        )

    def names(self) -> list[str]:
        """Paths of the layers, to be targeted."""
        return [f"layers.{i}" for i in range(len(self.layers))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``(..., size)`` through every layer."""
        for layer in self.layers:
            x = layer(x)
        return x


def warm_up(arm: str) -> None:
    """Do once, on a model of its own, what a library imports and caches at its first call."""
    lib = library(arm)
    peft_model = lib.get_peft_model(Wide(7), config(arm))
    peft_model.add_adapter("second", config(arm))
    peft_model.base_model.merge_adapter()
    peft_model.base_model.unmerge_adapter()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of one call: by the clock, and of the processor.

    The second does not wait for the disk or for other processes.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def resident() -> float:
    """MiB of memory that this process holds now; the peak is counted anew from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """The most MiB that this process has held since `resident` was last called."""
    return _status("VmHWM")


def in_process(script: str, *words: object, env: Mapping[str, str] | None = None) -> Any:
    """Run ``script --worker ...words`` in a new process and return the JSON that it prints last."""
    command = [sys.executable, "-W", "ignore", str(BENCH / script), "--worker", *map(str, words)]
    everything = {**os.environ, "OMP_NUM_THREADS": str(THREADS), **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=everything)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times longer PEFT takes, run by run."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def arguments(doc: str, runs: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--runs", type=int, default=runs, help="measurements of each row")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes: does it work at all?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser


def finish(report: Report, folder: Path) -> None:
    """Note how busy the machine was, and write."""
    load = f"Load average at the end: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores."
    report.note(f"One row a library, in turn. Threads of torch: {THREADS}. {load}").write(folder)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
