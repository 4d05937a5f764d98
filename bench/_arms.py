"""What the benchmarks share: the two libraries, the models, processes of their own, a clean start.

    for arm in ARMS:
        measured = in_process("attach.py", arm, "llama")   # runs `worker` there, returns its JSON

Each library runs in processes of its own where state counts (attaching, files): neither pays for
the other's imports. They take turns, so that a busy moment of the machine falls on both.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ARMS = ("multigraft", "peft")
BENCH = Path(__file__).resolve().parent
HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 512, 1408, 8, 8, 1000


def library(arm: str) -> Any:
    """The package, silenced: it is timed, not read."""
    warnings.simplefilter("ignore")
    return importlib.import_module(arm)


def config(arm: str, **options: Any) -> Any:
    """The LoRA that every benchmark attaches: rank 8 on every linear layer but the head."""
    return library(arm).LoraConfig(r=8, **{"target_modules": "all-linear", **options})


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The issue's model: 8 layers of hidden size 512, 56 linear layers besides the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
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


def settle() -> None:
    """Start from a clean heap.

    What imports left is frozen out of the collector's sight: one scan of it costs 0.3 s, and would
    fall on whichever measurement happens to trigger it. The collector stays on.
    """
    gc.collect()
    gc.freeze()


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident() -> float:
    """MiB of memory that this process holds now; the peak is counted anew from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _status("VmRSS")


def peak() -> float:
    """The most MiB that this process has held since `resident` was last called."""
    return _status("VmHWM")


def in_process(script: str, *words: object) -> Any:
    """Run ``script --worker ...words`` in a new process and return the JSON that it prints last."""
    command = [sys.executable, "-W", "ignore", str(BENCH / script), "--worker", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_note() -> str:
    """The machine's load average now, for the report."""
    return f"Load average at the end: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores."


def ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times longer PEFT takes, run by run."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
