"""What the wheel holds, and that it is enough to run the quick start elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "multigraft" / "demo"


@pytest.fixture(scope="module")
def wheel() -> dict[str, Path]:
    """The wheel's files by their place in it, and where they come from."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    included = builders.WheelBuilder(str(ROOT)).recurse_included_files()
    return {file.distribution_path: Path(file.path) for file in included}


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    for name, source in wheel.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder


def python(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python far from the checkout, with the wheel's files before anything installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_the_whole_demo(wheel):
    sources = {p for p in DEMO.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    expected = {f"multigraft/demo/{p.relative_to(DEMO).as_posix()}" for p in sources}
    assert "multigraft/demo/model/model.safetensors" in expected
    assert expected == {name for name in wheel if name.startswith("multigraft/demo/")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert {name.partition("/")[0] for name in wheel} == {"multigraft"}
    assert "multigraft/py.typed" in wheel
    assert not [name for name in wheel if "__pycache__" in name]


@pytest.mark.slow
def test_the_quick_start_runs_from_the_wheels_files_alone(unpacked, tmp_path):
    where = python(unpacked, tmp_path, "-c", "import multigraft; print(multigraft.__file__)")
    assert where.stdout.startswith(str(unpacked)), where.stderr
    short = ("--steps", "1", "--heldout", "1", "--output", "adapters")
    run = python(unpacked, tmp_path, "-m", "multigraft", "quickstart", *short)
    assert "none of the 28 adapted layers lies inside another one" in run.stdout, run.stderr
    assert "✓ reloaded on a fresh base, the adapters give equal outputs" in run.stdout
    assert (tmp_path / "adapters" / "dates" / "adapter_model.safetensors").is_file()
