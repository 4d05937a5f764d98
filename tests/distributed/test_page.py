"""The page on several devices: its Python runs on two processes."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.page_jobs import run_page
from tests.distributed.tiny import base
from tests.distributed.world import World


def test_the_pages_python_runs_on_two_processes(two: World, tmp_path: Path) -> None:
    base(torch.float32).save_pretrained(tmp_path / "base-model")
    for count, folders in two.run(run_page, str(tmp_path)):
        assert count == 5
        assert folders == ["parted", "sharded", "staged", "trained/first", "trained/second"]
    assert (tmp_path / "run" / "state.json").is_file()
