"""The page on runs: its file and its commands run as written, and every key is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from multigraft.demo import TASKS, examples, model_path
from multigraft.train.spec import RunSpec
from tests.docs import page

PAGE = "runs.md"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model_path(), target_is_directory=True)
    for name, task in zip(("dates", "codes"), TASKS, strict=False):
        rows = [
            {"prompt": each.prompt, "completion": each.completion}
            for each in examples(task, "train", 16, 0)
        ]
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (file,) = (text for language, text in page.blocks(PAGE) if language == "yaml")
    Path("run.yaml").write_text(file)
    names = page.run(PAGE)
    for folder in ("adapters/dates", "adapters/codes", "sweep/rank4-lr0.0001", "by-hand/dates"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file(), folder
        assert (tmp_path / folder / "train_log.jsonl").is_file(), folder
    assert len(list(Path("sweep").glob("rank*"))) == 4
    assert Path("adapters", "report.html").is_file()
    assert not Path("adapters", "checkpoints").exists()
    config = json.loads(Path("adapters/codes/adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"]) == (4, 0.05)
    assert [len(outcome.losses) for outcome in names["outcomes"]] == [2, 2]


def test_every_key_is_on_the_page():
    text = (page.DOCS / PAGE).read_text("utf-8")
    table = "".join(line for line in text.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", table.replace("`use_dora: true`", "")))
    assert set(RunSpec.model_fields) - named == {"name"}
    assert named <= set(RunSpec.model_fields)
