"""What the card of a trained adapter says."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from multigraft import LoraConfig
from multigraft.train import Recipe
from multigraft.train.card import MARK, facts_of
from tests.tiny_base import pair_rows, write_lines
from tests.train.jobs import one


def job(base: Path, folder: Path, **more):
    fields = {
        "model": str(base),
        "data": str(write_lines(folder / "data.jsonl", pair_rows())),
        "eval_data": str(write_lines(folder / "held-out.jsonl", pair_rows()[:4])),
        "output": str(folder / "out"),
        "config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "recipe": Recipe(steps=3, lr=1e-2),
    }
    return one(**{**fields, **more})


@pytest.mark.parametrize("name", ["default", "poems"])
def test_it_says_on_what_it_was_trained_and_what_was_measured(name, base_dir, tmp_path):
    (outcome,) = job(base_dir, tmp_path, name=name).prepare().run()
    card = huggingface_hub.ModelCard.load(outcome.folder / "README.md")
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["loss"] == outcome.eval_loss[1]
    assert card.data.eval_results[0].dataset_name == "held-out.jsonl"
    assert card.data.pipeline_tag == "text-generation"
    assert "- data: `data.jsonl`" in card.text
    assert "- steps: 3 of 3" in card.text
    assert str(tmp_path) not in card.text


def test_a_run_replaces_its_own_card_and_nobody_elses(base_dir, tmp_path):
    (outcome,) = job(base_dir, tmp_path).prepare().run()
    path = outcome.folder / "README.md"
    job(base_dir, tmp_path, recipe=Recipe(steps=2, lr=1e-2), overwrite=True).prepare().run()
    assert "- steps: 2 of 2" in path.read_text()
    own = path.read_text().replace(MARK, "Words of mine.")
    path.write_text(own)
    job(base_dir, tmp_path, overwrite=True).prepare().run()
    assert path.read_text() == own


def test_data_of_the_hub_is_metadata(base_dir, tmp_path):
    ready = job(base_dir, tmp_path).prepare()
    (adapter,) = ready.job.adapters
    object.__setattr__(adapter, "data", "me/verses@small:train")
    assert facts_of(adapter, ready.entrants[0]).datasets == ["me/verses"]
