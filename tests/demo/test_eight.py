"""Eight adapters on the demo's base: a run killed and resumed ends as eight runs alone do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from multigraft.demo import TASKS, examples, model_path

STEPS, ROWS = 8, 3
ADAPTERS = [
    {
        "name": f"{task.name}-{number}",
        "rank": rank,
        "lr": lr,
        "seed": number,
        "batch_size": ROWS - number % 2,
        "dropout": 0.1 * (number % 3),
    }
    for number, (task, rank, lr) in enumerate(
        (task, rank, lr) for task in TASKS for rank, lr in ((4, 3e-3), (8, 1e-3), (16, 2e-3))
    )
][:8]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for task in TASKS:
        rows = [
            {"prompt": each.prompt, "completion": each.completion}
            for each in examples(task, "train", STEPS * ROWS, 0)
        ]
        found[task.name] = folder / f"{task.name}.jsonl"
        found[task.name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return found


def run_file(path: Path, data: dict[str, Path], adapters: list[dict]) -> Path:
    own = [{**a, "data": str(data[a["name"].rpartition("-")[0]])} for a in adapters]
    path.write_text(
        json.dumps(  # which YAML reads as well
            {
                "model": str(model_path()),
                "output": str(path.with_suffix("")),
                "dtype": "float32",
                "device": "cpu",
                "steps": STEPS,
                "save_every": 2,
                "report": False,
                "adapters": own,
            }
        )
    )
    return path


def command(file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "multigraft", "train", str(file), "-q", *more]


def test_eight_adapters_killed_and_resumed_are_those_of_eight_runs(data, tmp_path):
    together = run_file(tmp_path / "together.yaml", data, ADAPTERS)
    output = together.with_suffix("")
    process = subprocess.Popen(command(together))
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/round-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(output.glob("*/adapter_model.safetensors"))
    subprocess.run(command(together, "--resume"), check=True)
    alone = subprocess.run([sys.executable, "-c", EACH, *map(str, files(data, tmp_path))])
    assert alone.returncode == 0
    for adapter in ADAPTERS:
        name = adapter["name"]
        ours, theirs = (
            load_file(folder / name / "adapter_model.safetensors")
            for folder in (output, tmp_path / f"alone-{name}")
        )
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            # Not element by element: Adam turns the sign of a gradient near zero into a whole step.
            distance = (value - theirs[key]).norm() / theirs[key].norm()
            assert distance < 1e-3, (name, key, distance)
        losses = [
            [json.loads(line)["loss"] for line in (folder / name / "train_log.jsonl").open()]
            for folder in (output, tmp_path / f"alone-{name}")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


EACH = """
import sys
from multigraft import cli

for file in sys.argv[1:]:
    try:
        cli.main(["train", file, "-q"])
    except SystemExit as end:
        if end.code:
            raise
"""


def files(data: dict[str, Path], folder: Path) -> list[Path]:
    return [run_file(folder / f"alone-{a['name']}.yaml", data, [a]) for a in ADAPTERS]
