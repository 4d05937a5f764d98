"""What `import multigraft` costs beyond `import torch`, beside `import peft`, in fresh processes.

PEFT imports transformers, so the second pair of rows starts where that is loaded already.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec

from _arms import arguments
from _report import Report

BASELINES = {
    "torch": "import torch, safetensors.torch",
    "torch, transformers": "import torch, safetensors.torch, transformers",
}
CODE = """
import sys, time
{baseline}
modules, start = len(sys.modules), time.perf_counter()
import {package}
print(time.perf_counter() - start, len(sys.modules) - modules)
"""


def measure(package: str, baseline: str, cache: str) -> tuple[float, int]:
    """Seconds and modules that `import package` adds to `baseline` in a new process.

    Args:
        cache: where compiled modules are kept, as they are beside installed ones; without it, an
            environment that forbids writing them would have us compile our sources each time.
    """
    code = CODE.format(package=package, baseline=baseline)
    here = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**here, "PYTHONPYCACHEPREFIX": cache},
    )
    if done.returncode:
        sys.exit(f"`import {package}` failed:\n{done.stderr}")
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)


def main() -> None:
    """Runs packages in turn, so that a busy moment of the machine falls on all of them."""
    options = arguments(__doc__, runs=11).parse_args()
    runs = options.runs
    cases = [
        (package, loaded)
        for loaded in BASELINES
        for package in ("multigraft", "peft")
        if all(find_spec(name) for name in (package, loaded.split()[-1]))
    ]
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    modules: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as cache:
        for run in range(runs + 1):
            for package, loaded in cases:
                seconds, count = measure(package, BASELINES[loaded], cache)
                if run:  # the first fills the caches, of the disk and of compiled modules
                    times[package, loaded].append(seconds * 1e3)
                    modules[package, loaded] = count
    report = Report("import_time", __doc__.splitlines()[0])
    for package, loaded in cases:
        report.row(
            library=package,
            after=loaded,
            ms=times[package, loaded],
            modules=modules[package, loaded],
        )
    report.note(f"Median and quartiles of {runs} processes; files in the disk's cache, compiled.")
    report.write(options.output)


if __name__ == "__main__":
    main()
