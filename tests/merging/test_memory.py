"""How much memory a merge takes, and what a kill leaves."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import multigraft as mg
from multigraft.merging import merge_files
from multigraft.merging.mapped import MappedWeights
from tests.merging.models import write_adapter, write_llama

pytest.importorskip("transformers")
PROGRAM = Path(__file__).with_name("measured_merge.py")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of a quarter of a gigabyte in shards, and an adapter of it."""
    root = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "initializer_range": 0.02}
    base = write_llama(root / "base", shard="60MB", **sizes, **heads)
    config = mg.LoraConfig(target_modules="all-linear", r=4)
    yield base, write_adapter(root / "adapter", base, config)
    shutil.rmtree(root)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account")
def test_memory_rises_by_a_layer_and_not_by_the_model(
    large: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = large
    weights = MappedWeights(base)
    assert len(weights.files) >= 4 and weights.size > 250e6
    small = write_llama(tmp_path / "small")
    own = write_adapter(tmp_path / "a", small, mg.LoraConfig(target_modules="all-linear", r=4))
    words = [small, own, base, adapter, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 0.35 * weights.size, f"{int(done.stdout) / 1e6:.0f} MB"
    assert MappedWeights(tmp_path / "out").size == weights.size


def test_a_killed_merge_leaves_nothing_under_the_final_name(
    large: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = large
    out = tmp_path / "out"
    words = ["merge", str(adapter), "--base", str(base), "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "multigraft", *words], stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".out.making-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and list(tmp_path.glob(".out.making-*"))
    merge_files([adapter], out, base=base, check="off")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
