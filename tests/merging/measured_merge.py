"""Run as a program: merge, and print how far resident memory rose above where it was before.

python measured_merge.py SMALL_BASE SMALL_ADAPTER BASE ADAPTER OUTPUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def memory(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main(small_base: str, small: str, base: str, adapter: str, output: str) -> None:
    from multigraft.merging import merge_files

    torch.set_num_threads(1)
    merge_files([small], f"{output}-small", base=small_base)  # whatever is imported on the way
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    merge_files([adapter], output, base=base)
    print(memory("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
