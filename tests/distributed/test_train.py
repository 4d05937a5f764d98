"""``torchrun … multigraft train``: several processes end with the adapters of one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft.cli import main
from tests.tiny_base import pair_rows, write_base, write_lines

WEIGHTS = "adapter_model.safetensors"
NAMES = ("one", "two", "three")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    base = write_base(folder / "base")
    data = write_lines(folder / "data.jsonl", pair_rows())
    path = folder / "run.yaml"
    path.write_text(
        f"model: {base}\ndata: {data}\nsteps: 6\nsave_every: 2\neval_split: 0.3\neval_every: 3\n"
        "device: cpu\nreport: false\nadapters:\n"
        "  - {name: one, rank: 2, batch_size: 3}\n"
        "  - {name: two, rank: 4, lr: 1e-3, batch_size: 4, accumulate: 2, dropout: 0.3}\n"
        "  - {name: three, rank: 2, batch_size: 1, steps: 4, seed: 2}\n"
    )
    return path


def command(run_file: Path, output: Path, ranks: int, *more: str) -> list[str]:
    words = ["multigraft", "train", str(run_file), "--output", str(output), *more]
    if ranks == 1:
        return [sys.executable, "-m", *words]
    launch = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1"]
    return [sys.executable, "-m", "torch.distributed.run", *launch, "-m", *words]


def run(*words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*words), capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(run_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run(run_file, output, 1)
    return output


def assert_same(one: Path, other: Path) -> None:
    for name in NAMES:
        ours, theirs = (load_file(folder / name / WEIGHTS) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.allclose(value, theirs[key], rtol=1e-3, atol=2e-5), (name, key)
        losses = [
            re.findall(r'"loss": ([\d.e-]+)', (folder / name / "train_log.jsonl").read_text())
            for folder in (one, other)
        ]
        assert [float(x) for x in losses[0]] == pytest.approx([float(x) for x in losses[1]], 1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_end_with_the_adapters_of_one(run_file, alone, tmp_path, strategy):
    done = run(run_file, tmp_path / "out", 2, "--strategy", strategy)
    assert done.stdout.count(f"on 2 processes ({strategy})") == 1
    assert_same(alone, tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_two_processes_with_parts_of_every_layer_end_so_too(run_file, tmp_path):
    file = tmp_path / "run.yaml"
    base = write_base(tmp_path / "base", kv_heads=2)
    text = run_file.read_text().replace(", dropout: 0.3", "")
    file.write_text(re.sub(r"model: .*", f"model: {base}", text))
    run(file, tmp_path / "alone", 1)
    done = run(file, tmp_path / "out", 2, "--strategy", "tp")
    assert done.stdout.count("on 2 processes (tp)") == 1
    assert "checkpoint " in done.stdout
    assert_same(tmp_path / "alone", tmp_path / "out")


def test_heads_that_do_not_divide_are_told(run_file, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(run_file.read_text().replace(", dropout: 0.3", ""))
    words = command(file, tmp_path / "out", 2, "--strategy", "tp")
    words.remove("--max-restarts=1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "`num_key_value_heads` (=1) does not divide among 2 processes" in done.stderr


def test_dropout_in_parts_is_refused(run_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", str(run_file), "--output", str(tmp_path / "out"), "--strategy", "tp"])
    assert end.value.code == 2
    assert "`dropout` (=0.3): `strategy` tp has none" in capsys.readouterr().err


def test_a_process_that_is_killed_is_started_again_and_the_run_goes_on(
    run_file, alone, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(run_file, out, 2, "--steps", "60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    folder = out / "checkpoints"
    deadline = time.monotonic() + 120
    while not (folder.is_dir() and any(folder.glob("round-*"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    before = max(folder.glob("round-*"))
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text[-3000:]
    assert "of which" in text  # steps that were made already
    assert before.name > "round-000000"
    for name in NAMES:
        log = (out / name / "train_log.jsonl").read_text()
        steps = [int(x) for x in re.findall(r'"step": (\d+), "steps": 60, "loss"', log)]
        assert steps == list(range(1, 61))


def test_what_two_processes_leave_one_goes_on_with(run_file, tmp_path):
    out = tmp_path / "out"
    words = command(run_file, out, 2, "--steps", "40")
    words.remove("--max-restarts=1")
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = out / "checkpoints"
    deadline = time.monotonic() + 120
    while not (folder.is_dir() and any(folder.glob("round-*"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    run(run_file, out, 1, "--steps", "40", "--resume")
    run(run_file, tmp_path / "whole", 1, "--steps", "40")
    for name in NAMES:
        losses = [
            [float(x) for x in re.findall(r'"loss": ([\d.e-]+), "lr"', log.read_text())]
            for log in (root / name / "train_log.jsonl" for root in (out, tmp_path / "whole"))
        ]
        assert len(losses[0]) == 40
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
