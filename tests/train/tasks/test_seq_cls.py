"""Sequence classification: its loss beside transformers' own, its labels, its measures."""

from __future__ import annotations

import re

import pytest
import torch

from multigraft import CheckpointError, ConfigError, DataError, LoraConfig
from multigraft.train.load import attach
from multigraft.train.records import Labelled, Refusal
from multigraft.train.tasks import task_of
from multigraft.train.tasks.seq_cls import Classified
from tests.train.tasks.bases import SUBJECTS

OWN = [s for s in SUBJECTS if s.task == "seq-cls"]


@pytest.mark.parametrize("subject", OWN, ids=lambda s: s.name)
def test_the_mean_of_its_losses_is_transformers_own_loss(subject, set_up):
    own = set_up(subject)
    model, batch = own.base.double(), own.batch(0, 7)
    labels = batch.labels.double() if batch.labels.is_floating_point() else batch.labels
    outputs = model(**batch.inputs, labels=labels)
    found = own.task.losses(outputs, batch).sum() / own.task.count(batch)
    assert torch.allclose(found, outputs.loss, rtol=1e-12)
    assert model.config.problem_type == {
        "single": "single_label_classification",
        "multi": "multi_label_classification",
        "regression": "regression",
    }.get(own.task.problem)


def labelled(*labels):
    return [Labelled("t", label, None, n) for n, label in enumerate(labels, start=1)]


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["b", "a", "b"], "single", ("a", "b")),
        ([10, 2, "1"], "single", ("1", "2", "10")),
        (["true", "false"], "single", ("false", "true")),
        ([("a",), ("b", "c"), ()], "multi", ("a", "b", "c")),
        ([0.5, 1, 2], "regression", ("value",)),
    ],
)
def test_the_data_tells_the_problem_and_the_labels_in_any_order(labels, problem, names):
    for order in (labels, labels[::-1]):
        task = task_of("seq-cls").settled(labelled(*order))
        assert (task.problem, task.labels) == (problem, names)
    assert task.settled(labelled("x", "y")) is task


def test_labels_that_are_given_keep_their_order():
    task = task_of({"name": "seq-cls", "labels": ["no", "yes"]}).settled(labelled("yes"))
    assert task.labels == ("no", "yes")
    assert task.problem == "single"


@pytest.mark.parametrize(("label", "classes"), [("yes", [1]), (1, [1]), ("0", [0]), (1.0, [1])])
def test_a_label_is_a_name_or_a_number(set_up, label, classes):
    own = set_up(OWN[0])
    task = task_of({"name": "seq-cls", "labels": ["no", "yes"], "problem": "single"})
    ((example,), is_cut) = task.pieces(labelled(label)[0], own.tokenizer, 16)
    assert example.classes == classes
    assert not is_cut


@pytest.mark.parametrize(
    ("task", "label", "why"),
    [
        ({"labels": ["no", "yes"]}, "yess", "'yess' is unknown.*Known: `no`, `yes`.*`yes`"),
        ({"labels": ["no", "yes"]}, 2, "label 2 is unknown"),
        ({"labels": ["no", "yes"]}, -1, "label -1 is unknown"),
        ({"labels": ["no", "yes"], "problem": "single"}, ("no",), "is a list, where one class"),
        ({"labels": ["value"], "problem": "regression"}, "x", "'x' is no number"),
        ({"labels": ["value"], "problem": "regression"}, (1, 2), "2 values, and 1"),
    ],
)
def test_a_label_that_means_nothing_is_refused(set_up, task, label, why):
    own = set_up(OWN[0])
    with pytest.raises(Refusal) as told:
        task_of({"name": "seq-cls", **task}).pieces(labelled(label)[0], own.tokenizer, 16)
    assert re.search(why, ". ".join(told.value.args))


def test_what_two_texts_have_too_many_tokens_is_cut_at_the_longer(set_up):
    own = set_up(OWN[2])
    record = Labelled("fine " * 9, 0, "dull fine", 1)
    ((example,), is_cut) = own.task.pieces(record, own.tokenizer, 8)
    words = own.tokenizer.convert_ids_to_tokens(example.ids)
    assert words == ["[CLS]", "fine", "fine", "fine", "[SEP]", "dull", "fine", "[SEP]"]
    assert example.segments == [0, 0, 0, 0, 0, 1, 1, 1]
    assert is_cut
    record = Labelled("dull fine", 0, "fine " * 9, 1)
    ((example,), _) = own.task.pieces(record, own.tokenizer, 8)
    assert example.segments == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("subject", OWN[:2], ids=lambda s: s.name)
def test_padding_changes_no_logits(subject, set_up):
    own = set_up(subject)
    short, long = sorted(own.examples, key=len)[:: len(own.examples) - 1]
    assert len(short) < len(long)
    batch = own.task.collate([short, long], own.pad)
    with torch.no_grad():
        together = own.base(**batch.inputs).logits
        for row, example in enumerate((short, long)):
            alone = own.base(**own.task.collate([example], own.pad).inputs).logits[0]
            assert torch.allclose(together[row], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"labels": "yes"}, "must be a list of names"),
        ({"labels": [1, 2]}, "must be a list of names"),
        ({"labels": ["a", "a"]}, "names `a` more than once"),
        ({"problem": "singel"}, "'singel'.*Nearest: `single`"),
        ({"lables": ["a"]}, "no option `lables`. Nearest: `labels`"),
    ],
)
def test_options_are_checked(options, why):
    with pytest.raises(ConfigError, match=why):
        task_of({"name": "seq-cls", **options})


def test_data_of_one_class_has_nothing_to_tell_apart():
    with pytest.raises(DataError, match="only the label 'a'"):
        task_of("seq-cls").settled(labelled("a", "a"))


def test_a_task_whose_labels_are_unknown_loads_nothing(folders):
    with pytest.raises(ConfigError, match="its labels are not known yet"):
        task_of("seq-cls").load(str(folders("bert")))


def test_a_new_head_is_the_same_each_time_and_each_adapter_has_its_own(set_up):
    own, again = set_up(OWN[0]), set_up(OWN[0])
    assert torch.equal(own.base.classifier.weight, again.base.classifier.weight)
    model = own.grown("a", "b")
    config = model.peft_config["b"]
    assert set(config.modules_to_save) >= {"classifier", "bert.pooler"}
    names = {name for name, _ in model.named_parameters()}
    for adapter in "ab":
        assert f"base_model.model.classifier.modules_to_save.{adapter}.weight" in names
        assert f"base_model.model.bert.pooler.dense.modules_to_save.{adapter}.weight" in names


def test_a_base_without_its_trunk_is_refused(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("bert"), tmp_path / "base")
    held = load_file(folder / "model.safetensors")
    held = {k: v for k, v in held.items() if "encoder.layer.1.output" not in k}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    task = task_of({"name": "seq-cls", "labels": ["a", "b"], "problem": "single"})
    with pytest.raises(CheckpointError, match="not those of a head alone"):
        task.load(str(folder))


def test_a_head_of_another_size_is_made_anew(folders, tmp_path):
    task = task_of({"name": "seq-cls", "labels": ["a", "b"], "problem": "single"})
    task.load(str(folders("bert"))).save_pretrained(tmp_path)
    three = task_of({"name": "seq-cls", "labels": ["a", "b", "c"], "problem": "single"})
    base = three.load(str(tmp_path))
    assert base.classifier.out_features == 3
    assert base.config.id2label == {0: "a", 1: "b", 2: "c"}
    model = attach(base, LoraConfig(target_modules=["query"]), "x", task_type="SEQ_CLS")
    assert "classifier" in model.peft_config["x"].modules_to_save


class Scripted:
    """A model whose logits are written down."""

    training = False

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def parameters(self):
        return iter([torch.nn.Parameter(self.logits)])

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, **_):
        return self


def measured(task, logits, *targets):
    examples = [Classified([1], [], *target) for target in targets]
    task = task_of({"name": "seq-cls", **task})
    return task.measures(Scripted(logits), examples, pad=0, batch_size=9)


def test_measures_of_one_class():
    task = {"labels": ["a", "b"], "problem": "single"}
    logits = [[2.0, 1.0], [0.0, 1.0], [2.0, 1.0], [0.0, 1.0]]
    found = measured(task, logits, *(([n], []) for n in (0, 0, 1, 1)))
    assert found == {"accuracy": 0.5, "f1": 0.5}


def test_measures_of_several_classes():
    task = {"labels": ["a", "b"], "problem": "multi"}
    found = measured(task, [[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], ([0], []), ([1], []), ([], []))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["f1_micro"] == pytest.approx(4 / 5)


def test_measures_of_values():
    task = {"labels": ["value"], "problem": "regression"}
    found = measured(task, [[1.0], [4.0], [9.0]], *(([], [float(n)]) for n in (1, 2, 3)))
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 1


def test_peft_gives_the_same_outputs_with_what_is_saved(set_up, tmp_path):
    peft = pytest.importorskip("peft")
    own = set_up(OWN[0])
    model = own.grown("a", init_lora_weights=False).eval()
    for parameter in model.roster.parameters("a"):
        parameter.data.add_(0.1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**own.batch(0, 4).inputs).logits
    theirs = peft.PeftModel.from_pretrained(set_up(OWN[0]).base, tmp_path / "a").eval()
    with torch.no_grad():
        found = theirs(**own.batch(0, 4).inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)
    base = set_up(OWN[0]).base
    with torch.no_grad():
        assert not torch.allclose(base(**own.batch(0, 4).inputs).logits, expected, atol=1e-2)
