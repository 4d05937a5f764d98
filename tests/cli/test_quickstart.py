"""`multigraft quickstart`: what it shows, what it leaves, and that it tells when it fails."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from multigraft import PeftModel
from multigraft.cli import main
from multigraft.demo import TASKS, model_path
from multigraft.train import load_model

NAMES = [task.name for task in TASKS]
STEPS = 3


@dataclass
class Run:
    code: object
    text: str
    output: Path

    def part(self, heading: str) -> str:
        """What stands between this heading and the next."""
        body = self.text.partition(f"\n{heading}\n\n")[2]
        assert body, f"no heading `{heading}`"
        return body


def quickstart(output: Path, *options: str) -> Run:
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main(["quickstart", "--output", str(output), *options])
    return Run(end.value.code, shown.getvalue(), output)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run so short that its adapters learn next to nothing."""
    output = tmp_path_factory.mktemp("quickstart") / "adapters"
    return quickstart(output, "--steps", str(STEPS), "--heldout", "4")


def test_each_adapter_shows_its_progress(run):
    shown = run.part("Training three adapters in one run, each on its own task")
    for task in TASKS:
        assert task.description in shown
        assert f"{task.name}: step {STEPS}/{STEPS}  loss " in shown


def test_the_structure_is_one_base_with_three_siblings_at_every_site(run):
    shown = run.part("Structure").partition("\n\nChecked")[0]
    root, *lines = shown.splitlines()
    assert root.startswith("LlamaForCausalLM  one frozen base of 3,868,928 parameters, 3 adapters")
    groups = [line for line in lines if line[:3] in ("├──", "└──")]
    leaves = [line.split("── ")[1].split()[0] for line in lines if line not in groups]
    assert len(groups) == 7
    assert leaves == NAMES * 7
    assert "none of the 28 adapted layers lies inside another one" in run.text


def test_every_adapter_is_scored_on_every_task(run):
    shown = run.part("Exact match on held-out examples: every adapter on every task")
    rows = [line.split() for line in shown.partition("\n\n")[0].splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["base", *NAMES]
    assert all(len([cell for cell in row if cell.endswith("%")]) == 3 for row in rows)


def test_the_mixed_batch_has_a_row_of_every_adapter_and_one_of_the_base(run):
    shown = run.part("One mixed batch: each row names its own adapter").partition("\n\n")[0]
    first = [line.split()[0] for line in shown.splitlines() if line[1:2].strip()]
    assert [name for name in first if name != "adapter_names"] == [*NAMES, *NAMES, "__base__"]


def test_what_it_saved_loads_onto_a_fresh_base(run):
    model = PeftModel.from_pretrained(
        load_model(model_path()), run.output / NAMES[0], adapter_name=NAMES[0]
    )
    for name in NAMES[1:]:
        model.load_adapter(run.output / name, name)
    assert list(model.peft_config) == NAMES


def test_a_broken_promise_is_shown_and_is_the_exit_code(run):
    shown = run.part("Summary")
    assert "✗ each adapter is above 90% on its own task" in shown
    assert "✓ 3 adapters stand side by side; none lies inside another" in shown
    assert "✓ reloaded on a fresh base, the adapters give equal outputs" in shown
    assert "A promise is broken" in shown
    assert run.code == 1


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main(["quickstart", "--output", str(tmp_path / "file")])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err == f"multigraft: {tmp_path / 'file'} is a file; the output must be a directory.\n"


@pytest.mark.slow
def test_every_promise_holds_after_enough_steps(tmp_path):
    run = quickstart(tmp_path / "adapters", "--steps", "60", "--heldout", "20")
    assert run.code == 0, run.text
    assert "Every promise holds" in run.part("Summary")
    assert "✗" not in run.text
