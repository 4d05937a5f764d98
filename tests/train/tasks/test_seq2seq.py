"""Sequence to sequence: its loss beside transformers' own, and what the decoder reads."""

from __future__ import annotations

import pytest
import torch

from multigraft import CheckpointError, ConfigError
from multigraft.train.encode import IGNORED
from multigraft.train.records import Chat, Pair, Refusal
from multigraft.train.tasks import task_of
from tests.train.tasks.bases import SUBJECTS

(OWN,) = (s for s in SUBJECTS if s.task == "seq2seq")


def test_the_mean_of_its_losses_is_transformers_own_loss(set_up):
    own = set_up(OWN)
    model = own.grown("a", exact=True, init_lora_weights=False).eval()
    losses, batch = own.loss(model, own.batch(0, 7))
    expected = model(**own.batch(0, 7).inputs, labels=batch.labels).loss
    assert torch.allclose(losses.sum() / own.task.count(batch), expected, rtol=1e-12)
    assert len({int((row >= 0).sum()) for row in batch.labels}) > 1


def test_the_decoder_reads_the_target_one_place_on(set_up):
    own = set_up(OWN)
    _, batch = own.loss(own.grown("a"), own.batch(0, 7))
    read = batch.inputs["decoder_input_ids"]
    assert (read[:, 0] == own.base.config.decoder_start_token_id).all()
    known = batch.labels[:, :-1] >= 0
    assert (read[:, 1:] == batch.labels[:, :-1])[known].all()
    assert (batch.labels == IGNORED).any()


def test_both_texts_are_cut_to_their_lengths(set_up):
    own = set_up(OWN)
    task = task_of({"name": "seq2seq", "max_target_length": 3})
    ((example,), is_cut) = task.pieces(Pair("fine " * 9, "dull " * 9, 1), own.tokenizer, 5)
    assert (len(example.ids), len(example.target)) == (5, 3)
    assert example.ids[-1] == own.tokenizer.sep_token_id
    assert is_cut
    ((example,), is_cut) = task.pieces(Pair("fine", "dull", 1), own.tokenizer, 5)
    assert example.target[-1] == own.tokenizer.eos_token_id
    assert not is_cut


def test_an_instruction_without_a_template_is_a_pair_and_a_conversation_is_refused(set_up):
    own = set_up(OWN)
    turns = ({"role": "user", "content": "fine"}, {"role": "assistant", "content": "dull"})
    pair = Pair("fine", "dull", 1)
    plain = own.task.pieces(Chat(turns, 1, pair), own.tokenizer, 9)
    assert plain == own.task.pieces(pair, own.tokenizer, 9)
    with pytest.raises(Refusal, match="a conversation is not"):
        own.task.pieces(Chat(turns, 1), own.tokenizer, 9)


@pytest.mark.parametrize("length", [1, 2.5, True, "9"])
def test_options_are_checked(length):
    with pytest.raises(ConfigError, match=r"`max_target_length`.*at least 2"):
        task_of({"name": "seq2seq", "max_target_length": length})


def test_a_model_without_a_decoder_of_its_own_is_refused(folders):
    with pytest.raises(CheckpointError, match="no model could be read"):
        task_of("seq2seq").load(str(folders("llama")))


def test_exact_match_is_of_what_the_model_writes(set_up):
    own = set_up(OWN)
    model = own.grown("a").eval()
    written = [
        model.generate(
            input_ids=torch.tensor([e.ids]), do_sample=False, max_new_tokens=len(e.target)
        )[0, 1:].tolist()
        for e in own.examples[:6]
    ]
    kind = own.task.example
    right = [kind(e.ids, w) for e, w in zip(own.examples[:6], written, strict=True)]
    wrong = [kind(e.ids, [*e.target[:-1], 5]) for e in own.examples[:2]]
    found = own.task.measures(model, right + wrong, pad=own.pad, batch_size=4)
    assert found["exact_match"] == pytest.approx(6 / 8)
    assert found["token_accuracy"] >= 0.5
