"""The quick start's job: each promise is kept or broken by what was found, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multigraft import TrainingError
from multigraft.cli import main
from multigraft.demo import TASKS
from multigraft.demo.quickstart import BASE, Quickstart, Reload, Scores
from multigraft.demo.recipe import Recipe
from multigraft.layer import AdaptedLayer

NAMES = [task.name for task in TASKS]
SIDE_BY_SIDE, ABOVE, BELOW, RELOADED = range(4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Quickstart:
    output = tmp_path_factory.mktemp("quickstart")
    return Quickstart(output, recipe=Recipe(steps=2, batch=2, heldout=2, max_new_tokens=8))


@pytest.fixture
def job(shared: Quickstart) -> Quickstart:
    """A job for which every promise holds, as far as the figures go."""
    table = {(BASE, name): 0.05 for name in NAMES}
    table |= {(a, t): 0.91 if a == t else 0.0 for a in NAMES for t in NAMES}
    shared.scores = Scores(table, 100)
    shared.reloaded = Reload(tuple(Path(name) for name in NAMES), 0.0, 7)
    return shared


def kept(job: Quickstart) -> list[bool]:
    return [promise.is_kept for promise in job.promises()]


def test_all_promises_hold_at_their_limits(job):
    assert kept(job) == [True] * 4


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_at_90_percent_is_not_above(job, name):
    job.scores.table[name, name] = 0.90
    assert kept(job) == [True, False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_a_base_that_solves_a_task_breaks_a_promise(job, name):
    job.scores.table[BASE, name] = 0.06
    assert kept(job) == [True, True, False, True]


def test_the_least_difference_after_reloading_breaks_a_promise(job):
    job.reloaded = Reload(job.reloaded.folders, 1e-7, 7)
    assert kept(job) == [True, True, True, False]


def test_a_layer_inside_another_breaks_a_promise(job):
    layers = [m for m in job.model.modules() if isinstance(m, AdaptedLayer)]
    outer, inner = layers[:2]
    outer.base_layer.add_module("inside", inner)
    try:
        assert kept(job) == [False, True, True, True]
    finally:
        del outer.base_layer.inside
    assert kept(job) == [True] * 4


def test_a_site_that_lacks_an_adapter_breaks_a_promise(job):
    layer = job.model.base_model.layers()[0]
    gone = layer.grafts.pop(NAMES[0])
    try:
        assert kept(job) == [False, True, True, True]
    finally:
        layer.grafts = {NAMES[0]: gone, **layer.grafts}


def test_a_reload_that_differs_is_found(tmp_path):
    job = Quickstart(tmp_path, recipe=Recipe(steps=1, batch=2, heldout=1))
    job.train()
    assert job.reload().max_difference == 0.0
    with torch.no_grad():
        for layer in job.model.base_model.layers():
            layer.lora_B["records"].weight += 0.1
    assert job.reload().max_difference > 0.0


def test_the_run_that_it_makes_can_be_made_again_by_hand(tmp_path):
    job = Quickstart(tmp_path / "first", recipe=Recipe(steps=2, batch=2, heldout=1))
    job.train()
    again = tmp_path / "again"
    main_of_train([str(job.run_file), "--output", str(again), "--quiet"])
    for name in NAMES:
        files = [folder / name / "adapter_model.safetensors" for folder in (job.output, again)]
        assert files[0].read_bytes() == files[1].read_bytes()


def main_of_train(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 0


def test_the_mixed_batch_takes_adapters_in_turn_and_ends_with_the_base(shared):
    rows = shared.mixed_batch()
    assert [row.adapter for row in rows] == [*NAMES, *NAMES, BASE]
    assert all("Input:" not in row.text and row.text for row in rows)


def test_an_output_that_is_a_file_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file is a file"):
        Quickstart(tmp_path / "file")
