"""Token classification: its loss beside transformers' own, and which token has a word's tag."""

from __future__ import annotations

import re

import pytest
import torch

from multigraft import DataError
from multigraft.train import load_tokenizer
from multigraft.train.encode import IGNORED
from multigraft.train.records import Refusal, Tagged
from multigraft.train.tasks import task_of
from multigraft.train.tasks.token_cls import aligned
from tests.train.tasks.bases import SUBJECTS

(OWN,) = (s for s in SUBJECTS if s.task == "token-cls")
TASK = task_of({"name": "token-cls", "labels": ["O", "X"]})


def test_the_mean_of_its_losses_is_transformers_own_loss(set_up):
    own = set_up(OWN)
    model, batch = own.base.double(), own.batch(0, 7)
    outputs = model(**batch.inputs, labels=batch.labels)
    found = own.task.losses(outputs, batch).sum() / own.task.count(batch)
    assert torch.allclose(found, outputs.loss, rtol=1e-12)


def test_a_words_first_token_has_its_tag_and_no_other(folders):
    tokenizer = load_tokenizer(folders("llama"))
    words = ("Philadelphia", "is", "(very)", "big")
    ((example,), is_cut) = TASK.pieces(Tagged(words, ("X", "O", "X", "O"), 1), tokenizer, 64)
    assert not is_cut
    firsts = [at for at, tag in enumerate(example.tags) if tag != IGNORED]
    assert [example.tags[at] for at in firsts] == [1, 0, 1, 0]
    assert len(example.ids) > len(words)
    ends = [*firsts[1:], len(example.ids)]
    pieces = [tokenizer.decode(example.ids[a:b]) for a, b in zip(firsts, ends, strict=True)]
    assert [piece.strip() for piece in pieces] == list(words)


def test_words_are_aligned_as_transformers_aligns_them(set_up):
    own = set_up(OWN)
    words = ["ada", "went", "to", "rome"]
    coded = own.tokenizer(words, is_split_into_words=True)
    ids, firsts = aligned(words, own.tokenizer)
    assert ids == coded["input_ids"]
    assert firsts == coded.word_ids()


def test_what_is_cut_loses_its_last_words_and_keeps_the_closing_token(set_up):
    own = set_up(OWN)
    record = Tagged(("ada", "went", "to", "rome"), ("X", "O", "O", "X"), 1)
    ((example,), is_cut) = TASK.pieces(record, own.tokenizer, 4)
    assert is_cut
    assert own.tokenizer.convert_ids_to_tokens(example.ids) == ["[CLS]", "ada", "went", "[SEP]"]
    assert example.tags == [IGNORED, 1, 0, IGNORED]


@pytest.mark.parametrize(
    ("tags", "length", "why"),
    [(("X", "Y"), 16, "'Y' is unknown.*Known: `O`, `X`"), (("X", "O"), 2, "within `max_length`")],
)
def test_what_cannot_be_learned_is_refused(set_up, tags, length, why):
    own = set_up(OWN)
    with pytest.raises(Refusal) as told:
        TASK.pieces(Tagged(("ada", "sang"), tags, 1), own.tokenizer, length)
    assert re.search(why, ". ".join(told.value.args))


def test_the_labels_are_all_tags_of_the_data():
    records = [Tagged(("a", "b"), ("O", "B-X"), 1), Tagged(("a",), ("I-X",), 2)]
    assert task_of("token-cls").settled(records).labels == ("B-X", "I-X", "O")
    with pytest.raises(DataError, match="only the label 'O'"):
        task_of("token-cls").settled([Tagged(("a",), ("O",), 1)])


def test_measures_are_of_words_and_of_whole_entities(set_up):
    own = set_up(OWN)
    found = own.task.measures(own.base, own.examples, pad=own.pad, batch_size=4)
    right = total = 0
    with torch.no_grad():
        for example in own.examples:
            logits = own.base(input_ids=torch.tensor([example.ids])).logits[0].argmax(-1).tolist()
            known = [at for at, tag in enumerate(example.tags) if tag != IGNORED]
            right += sum(logits[at] == example.tags[at] for at in known)
            total += len(known)
    assert found["accuracy"] == pytest.approx(right / total)
    assert set(found) == {"accuracy", "f1", "entity_f1"}
