"""The task in an adapter's folder, and whole runs of tasks from files to files."""

from __future__ import annotations

import json

import pytest
import torch

import multigraft
from multigraft import CheckpointError, PeftModel
from multigraft.cli import main
from multigraft.train.tasks import read_task, task_of, write_task
from tests.tiny_base import write_lines
from tests.train.tasks.bases import SUBJECTS, opinions, preferences, travels

ONE, DECODER = SUBJECTS[1:3]


@pytest.fixture
def run(capsys):
    def call(*words, code=0):
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capsys.readouterr()
        assert end.value.code == code, out + err
        return out + err

    return call


def test_a_note_makes_the_same_task(set_up, tmp_path):
    own = set_up(ONE)
    write_task(tmp_path, own.task, own.base)
    assert read_task(tmp_path) == own.task
    found = json.loads((tmp_path / "task.json").read_text())
    assert found["base"]["id2label"] == {"0": "bad", "1": "good"}


def test_a_plain_language_model_needs_no_note(set_up, tmp_path):
    own = set_up(ONE)
    write_task(tmp_path, own.task, own.base)
    write_task(tmp_path, task_of("dpo"), own.base)
    assert not (tmp_path / "task.json").exists()
    assert read_task(tmp_path) == task_of("causal-lm")


@pytest.mark.parametrize("text", ["{", "[]", '{"task": 3, "base": {}}', '{"task": {}}'])
def test_a_damaged_note_is_refused(tmp_path, text):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"task.json cannot be read"):
        read_task(tmp_path)


@pytest.mark.parametrize("subject", [ONE, DECODER], ids=lambda s: s.name)
def test_an_adapters_files_alone_give_base_labels_and_outputs(subject, set_up, tmp_path):
    own = set_up(subject)
    model = own.grown("default", init_lora_weights=False).eval()
    model.save_pretrained(tmp_path)
    write_task(tmp_path, own.task, own.base)
    again = multigraft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.get_base_model().config.id2label == {0: "bad", 1: "good"}
    batch = own.batch(0, 6)
    with torch.no_grad():
        assert torch.equal(again(**batch.inputs).logits, model(**batch.inputs).logits)


def test_classes_are_learned_from_a_file_and_reloaded(run, folders, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", opinions(40))
    out, base = str(tmp_path / "out"), str(folders("bert"))
    words = ["train", "--model", base, "--data", str(data), "--output", out, "--task", "seq-cls"]
    run(*words, "--steps=60", "--eval-split=0.3", "--lr=1e-2", "--device=cpu")
    task = read_task(out)
    assert task.labels == ("bad", "good")
    model = PeftModel.from_pretrained(task.load(base, device="cpu"), out).eval()
    from multigraft.train import load_tokenizer

    coded = load_tokenizer(base)(["the film was lovely", "the film was grim"], return_tensors="pt")
    with torch.no_grad():
        assert model(**coded).logits.argmax(1).tolist() == [1, 0]


def test_several_adapters_learn_tags_in_one_run(run, folders, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", travels(24))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {folders('bert')}\noutput: {tmp_path / 'out'}\ndata: {data}\ndevice: cpu\n"
        "task: {name: token-cls, labels: [O, B-PER, B-LOC]}\nsteps: 20\nlr: 0.01\n"
        "eval_split: 0.3\nadapters:\n  - {name: a, rank: 2}\n  - {name: b, rank: 4}\n"
    )
    run("train", str(file))
    for name in "ab":
        assert read_task(tmp_path / "out" / name).labels == ("O", "B-PER", "B-LOC")
        lines = (tmp_path / "out" / name / "train_log.jsonl").read_text().splitlines()
        found = [row for row in map(json.loads, lines) if "entity_f1" in json.dumps(row)]
        assert len(found) == 2


def test_preferences_are_learned_from_a_file(run, folders, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", preferences(16))
    out, base = str(tmp_path / "out"), str(folders("llama"))
    words = ["train", "--model", base, "--data", str(data), "--output", out, "--device", "cpu"]
    run(*words, "--task", '{"name": "dpo", "beta": 0.5}', "--steps=4", "--eval-split=0.3")
    assert multigraft.PeftConfig.from_pretrained(out).task_type == "CAUSAL_LM"


def test_bad_lines_and_options_are_told(run, folders, tmp_path):
    rows = [*opinions(8), {"text": "fine", "label": None}, {"text": "fine", "label": "goood"}]
    data = write_lines(tmp_path / "d.jsonl", rows)
    words = ["train", "--model", str(folders("bert")), "--data", str(data)]
    words += ["--output", str(tmp_path / "out"), "--steps", "2", "--device", "cpu", "--task"]
    told = run(*words, '{"name": "seq-cls", "labels": ["good", "bad"]}', code=2)
    assert f"{data}:9: `label` is null" in told
    assert f"{data}:10: the label 'goood' is unknown" in told
    assert "Nearest: `good`" in told
    assert "Nearest: `seq-cls`" in run(*words, "seq-clas", code=2)
    assert "Nearest: `labels`" in run(*words, '{"name": "seq-cls", "lables": []}', code=2)
