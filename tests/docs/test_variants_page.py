"""docs/variants.md: every example runs, and every variant has a section."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from tests.oracle import llama

PAGE = (Path(__file__).parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", PAGE, re.M | re.S))


@pytest.mark.parametrize("title", SECTIONS)
def test_the_examples_of_a_section_run(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 5, 6, 7], [3, 4, 9, 7, 8]])
    blocks = re.findall(r"^```python\n(.+?)^```", SECTIONS[title], re.M | re.S)
    assert blocks, f"{title}: no example"
    names = {"base": llama().eval(), "ids": ids}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, f"variants.md: {title}", "exec"), names)


def test_every_section_names_its_paper() -> None:
    for title, text in SECTIONS.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}", text), title
