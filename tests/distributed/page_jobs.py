"""What each rank does to run the page's Python."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from tests.distributed.tensor_parallel_jobs import parted_base
from tests.distributed.tiny import base, batch, loss_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def empty_model(folder: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def run_page(folder: str) -> tuple[int, list[str]]:
    """How many blocks ran, and the adapters' files that they left."""
    names = {
        "load_whole": lambda: base(torch.float32),
        "load_parted": parted_base,
        "empty_model": empty_model,
        "ids_of": batch,
        "loss_of": loss_of,
    }
    before = Path.cwd()
    os.chdir(folder)
    try:
        blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    finally:
        os.chdir(before)
    files = Path(folder).rglob("adapter_model.safetensors")
    return len(blocks), sorted(str(p.parent.relative_to(folder)) for p in files)
