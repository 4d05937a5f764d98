"""The whole job on a user's files: checked first, saved whole, loadable by both libraries."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from multigraft import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    DataError,
    LoraConfig,
    PeftModel,
    TargetError,
    TrainingError,
)
from multigraft.train import Job, Progress, Recipe, Watch, load_model
from multigraft.train.recipe import LARGEST_SEED
from tests.tiny_base import chat_rows, pair_rows, write_lines
from tests.train.jobs import one, only


@pytest.fixture
def job(base_dir, tmp_path):
    """Makes a `Job` of one adapter on the tiny base; keywords replace its fields."""

    def make(rows=None, **changes) -> Job:
        fields = {
            "model": str(base_dir),
            "data": str(write_lines(tmp_path / "data.jsonl", rows or pair_rows())),
            "output": str(tmp_path / "out"),
            "config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
            "recipe": Recipe(steps=3, lr=1e-2),
        }
        return one(**{**fields, **changes})

    return make


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


@pytest.mark.parametrize("rows", [pair_rows(), chat_rows()], ids=["pairs", "chats"])
@pytest.mark.parametrize("library", ["multigraft", "peft"])
def test_what_is_saved_loads_and_acts_as_trained(job, rows, library):
    ready = job(rows).prepare()
    outcome = only(ready.run())
    klass = PeftModel if library == "multigraft" else pytest.importorskip("peft").PeftModel
    base = load_model(ready.job.model)
    untouched = logits(base)
    loaded = logits(klass.from_pretrained(base, outcome.folder))
    assert torch.allclose(loaded, logits(ready.model), atol=1e-5)
    assert not torch.allclose(loaded, untouched, atol=1e-3)


def test_the_base_is_as_it_was(job, base_dir):
    ready = job().prepare()
    before = {k: v.clone() for k, v in load_model(base_dir).state_dict().items()}
    ready.run()
    assert ready.model.unload() is ready.base
    after = ready.base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["checkpoints", "Report.html", "tensorboard", "train_log.jsonl"])
def test_an_adapter_that_is_called_as_a_file_of_the_run_is_refused(job, tmp_path, name):
    with pytest.raises(ConfigError, match=f"the name '{name}' is that of files of the run's own"):
        job(name=name).prepare()
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_trains(job):
    (outcome,) = job(recipe=Recipe(steps=3, lr=1e-2, seed=LARGEST_SEED - 1)).prepare().run()
    assert len(outcome.losses) == 3


def test_options_of_too_few_values_are_refused(job):
    with pytest.raises(ConfigError, match=r"`optimizer_options` .*adamw does not take them"):
        job(recipe=Recipe(steps=1, optimizer_options={"betas": [0.9]})).prepare()


def test_another_name_than_default_gets_a_subfolder(job, tmp_path):
    outcome = only(job(name="dates").prepare().run())
    assert outcome.folder == tmp_path / "out" / "dates"
    assert (outcome.folder / "adapter_model.safetensors").is_file()


def test_held_out_data_is_measured_before_and_after(job, tmp_path):
    held_out = str(write_lines(tmp_path / "held.jsonl", [*pair_rows()[:3], *chat_rows()[:1]]))
    outcome = only(job(eval_data=held_out, recipe=Recipe(steps=20, lr=1e-2)).prepare().run())
    before, after = outcome.eval_loss
    assert after < before
    assert all(0.0 <= share <= 1.0 for share in outcome.exact_match)


def test_without_held_out_data_nothing_is_measured(job):
    outcome = only(job().prepare().run())
    assert (outcome.eval_loss, outcome.exact_match) == (None, None)


def test_an_adapter_that_is_there_is_kept_unless_it_may_be_replaced(job):
    first = only(job().prepare().run()).folder / "adapter_model.safetensors"
    kept = first.read_bytes()
    with pytest.raises(TrainingError, match=r"holds an adapter already.*--overwrite"):
        job().prepare()
    assert first.read_bytes() == kept
    job(overwrite=True, recipe=Recipe(steps=3, lr=1e-2, seed=1)).prepare().run()
    assert first.read_bytes() != kept


def test_bad_lines_can_be_left_out_and_are_reported(job):
    rows = ["not json", *pair_rows()]
    with pytest.raises(DataError, match=r"data\.jsonl:1: not valid JSON"):
        job(rows).prepare()
    ready = job(rows, on_bad_line="skip").prepare()
    assert [line.line for line in ready.bad] == [1]
    assert len(ready.entrants[0].lane.examples) == len(pair_rows())


def test_examples_that_are_cut_are_counted(job):
    rows = [*pair_rows(), {"prompt": "p", "completion": "word " * 100}]
    assert job(rows, max_length=40).prepare().cut == 1


def test_an_example_of_more_tokens_than_the_model_has_positions_is_refused(job):
    rows = [*pair_rows(), {"prompt": "p", "completion": "word " * 100}]
    with pytest.raises(
        TrainingError, match=r"longest example has \d+ tokens and the model takes 12"
    ):
        job(rows).prepare()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "nope.jsonl"}, DataError, "nope.jsonl cannot be read"),
        ({"eval_data": "nope.jsonl"}, DataError, "nope.jsonl cannot be read"),
        ({"model": "./nope"}, CheckpointError, "no such directory"),
        ({"name": "a/b"}, AdapterNameError, "a/b"),
        (
            {"config": LoraConfig(target_modules=["q_porj"])},
            TargetError,
            "`q_porj`. Nearest: `q_proj`",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(job, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        job(**changes).prepare()
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(job, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match="file is a file; the output must be a directory"):
            job(output=str(output)).prepare()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a directory that takes no files")
def test_an_output_that_cannot_be_written_is_found_before_training(job):
    with pytest.raises(TrainingError, match="/proc/self cannot be written to"):
        job(output="/proc/self/out").prepare()


def test_the_check_of_the_output_leaves_nothing_there(job, tmp_path):
    (tmp_path / "out").mkdir()
    job().prepare()
    assert not list((tmp_path / "out").iterdir())


class Stop:
    """A callback that is interrupted after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, now) -> None:
        if isinstance(now, Progress) and now.step == self.step:
            raise KeyboardInterrupt


def interrupted(ready, after: int = 2) -> str:
    with pytest.raises(KeyboardInterrupt):
        ready.run(Stop(after))
    return ready.rescue()


def test_an_interrupted_run_saves_what_it_has_learned_and_says_how_to_go_on(job, base_dir):
    ready = job().prepare()
    said = interrupted(ready)
    folder = Path(ready.job.output, "checkpoints", "round-000002")
    assert said == (
        f"everything as it was after 2 rounds is saved in {folder}. The same command with --resume "
        "goes on from there"
    )
    loaded = PeftModel.from_pretrained(load_model(base_dir), folder / "default")
    assert torch.equal(logits(loaded), logits(ready.model))


def test_an_interrupted_run_never_replaces_an_adapter(job):
    folder = only(job().prepare().run()).folder
    kept = (folder / "adapter_model.safetensors").read_bytes()
    ready = job(overwrite=True, recipe=Recipe(steps=3, seed=9)).prepare()
    assert interrupted(ready).endswith("goes on from there")
    assert (folder / "adapter_model.safetensors").read_bytes() == kept


def test_an_unfinished_run_is_not_begun_anew_by_mistake(job):
    interrupted(job().prepare())
    with pytest.raises(TrainingError, match=r"holds an unfinished run. Go on with --resume"):
        job().prepare()
    job(overwrite=True).prepare()


def test_a_run_interrupted_before_its_first_step_saves_nothing(job):
    ready = job().prepare()
    assert ready.rescue() == "no step was made, and nothing was saved"
    assert not Path(ready.job.output).exists()


def test_a_run_interrupted_in_its_last_answers_is_saved(job, tmp_path, monkeypatch):
    held_out = str(write_lines(tmp_path / "held.jsonl", pair_rows()[:1]))
    ready = job(eval_data=held_out).prepare()
    answered = []

    def answers(model) -> list:
        if answered:
            raise KeyboardInterrupt
        answered.append(model)
        return []

    monkeypatch.setattr(ready.entrants[0].held_out, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        ready.run()
    assert ready.rescue().startswith(f"all adapters are saved in {ready.job.output}")
    assert Path(ready.job.output, "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ""}, r"`output` \(=''\) must name"),
        ({"output": "a\0b"}, r"`output` \(='a\\x00b'\) must name"),
        ({"data": "a\0b"}, r"`data` \(='a\\x00b'\) must name"),
        ({"watch": Watch(every=2)}, "there are none. Give `eval_data` or `eval_split`"),
        ({"watch": Watch(measure="accuracy")}, "there are none. Give `eval_data` or `eval_split`"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_read(job, changes, message):
    with pytest.raises(ConfigError, match=message):
        job(**changes).prepare()


def test_names_that_differ_in_case_alone_would_share_a_folder(job):
    (own,) = job().adapters
    twins = [dataclasses.replace(own, name=name) for name in ("dates", "Dates")]
    with pytest.raises(ConfigError, match="`dates` and `Dates` would share a folder"):
        dataclasses.replace(job(), adapters=twins).prepare()


def test_data_that_changed_is_not_resumed(job, tmp_path):
    interrupted(job().prepare())
    rows = [{**row, "completion": row["completion"][::-1]} for row in pair_rows()]
    with pytest.raises(CheckpointError, match=r"`adapters.default.data.content` was"):
        job(rows, resume=True).prepare()


def test_a_run_that_replaces_another_leaves_none_of_its_checkpoints(job):
    interrupted(job(recipe=Recipe(steps=9, seed=1)).prepare(), after=8)
    interrupted(job(overwrite=True, recipe=Recipe(steps=9)).prepare(), after=2)
    folder = Path(job().output, "checkpoints")
    assert [path.name for path in folder.iterdir()] == ["round-000002"]
    assert job(resume=True, recipe=Recipe(steps=9)).prepare().found.round == 2
