"""The page on plans: its Python runs as written."""

from __future__ import annotations

import re

import pytest

from tests.docs import page

TEXT = (page.DOCS / "plan.md").read_text("utf-8")


def test_its_python_runs_and_prints_every_part(capsys):
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "plan.md", "exec"), names)
    shown = capsys.readouterr().out
    for part in ("base weights", "activations", "allowance", "largest batch that fits"):
        assert part in shown


def test_it_names_every_strategy_and_optimiser_that_there_is():
    from multigraft.planning.optimizers import STATES
    from multigraft.planning.strategies import STRATEGIES

    assert all(f"`{name}`" in TEXT for name in (*STRATEGIES, *STATES))
