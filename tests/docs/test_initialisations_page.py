"""docs/initialisations.md: its examples run, and every initialisation has a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from multigraft.initialisations import INITIALISATIONS
from tests.docs.test_runnable_pages import DOCS, run


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        names = run("initialisations.md")
    finally:
        INITIALISATIONS.unregister("identity")
    model = names["model"]
    assert list(model.peft_config) == ["corda", "gradient", "eva", "mine"]
    (mine,) = [graft for _, graft in model.roster.grafts("mine")]
    assert torch.equal(mine.params["lora_A.weight"], torch.eye(2, 8))
    eva = model.roster.grafts("eva")
    assert sum(graft.method.rank for _, graft in eva) == 4
    assert (tmp_path / "plain" / "adapter_model.safetensors").is_file()


def test_every_initialisation_has_a_row() -> None:
    page = (DOCS / "initialisations.md").read_text(encoding="utf-8")
    rows = set(re.findall(r'^\| `"?(\w+)"?` \|', page, re.MULTILINE))
    assert {name.lower() for name in rows} - {"pissa_niter_4"} == set(INITIALISATIONS)
