"""Every script in bench/ runs at its smallest size and reports both libraries.

No time is asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench import _report

COLUMNS = {
    "attach": {"total ms", "last / 2nd"},
    "combine": {"rule", "CPU ms", "distance from the sum"},
    "import_time": {"ms", "modules"},
    "load_save": {"operation", "CPU ms among 4"},
    "merge": {"merge, CPU ms", "error / rounding", "% changed after unmerge"},
    "step": {"shape", "CPU ms"},
    "train": {"shape", "tokens/s", "times PEFT's speed"},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=sorted(COLUMNS))
def facts(request, tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    script = _report.ROOT / "bench" / f"{request.param}.py"
    words = [str(script), "--smallest", "--runs", "1", "--output", str(folder)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.json")
    assert path.stem.startswith(request.param)
    return json.loads(path.read_text())


def test_a_benchmark_measures_both_libraries_in_every_case(facts):
    name = facts["command"].split()[1].removeprefix("bench/").removesuffix(".py")
    arms = [row["library"] for row in facts["rows"]]
    assert arms == ["multigraft", "peft"] * (len(arms) // 2)
    assert arms
    for row in facts["rows"]:
        assert COLUMNS[name] <= set(row)
        samples = [value["samples"] for value in row.values() if isinstance(value, dict)]
        assert samples
        assert all(len(times) == 1 for times in samples)


def test_doras_step_is_measured_beside_loras_and_pefts(tmp_path):
    pytest.importorskip("peft")
    script = _report.ROOT / "bench" / "dora.py"
    words = [str(script), "--smallest", "--runs", "1", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("dora*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["multigraft, LoRA", "multigraft, DoRA", "peft, DoRA"]
    lora, ours, theirs = (row["MiB kept for backward"] for row in rows)
    assert lora < ours < theirs
