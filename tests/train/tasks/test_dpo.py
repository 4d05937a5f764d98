"""DPO: the losses by the papers' formulas and by TRL, the reference, and the measures."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from multigraft import ConfigError
from multigraft.train.encode import Encoded
from multigraft.train.records import Chat, Pair, Preference, Refusal
from multigraft.train.tasks import task_of
from multigraft.train.tasks.dpo import Preferred
from tests.train.tasks.bases import SUBJECTS, preferences

(OWN,) = (s for s in SUBJECTS if s.task == "dpo")


def log_probability(model, signed):
    """Of an answer's tokens, one after another."""
    example = Encoded.of_signed(signed)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    values = logits.log_softmax(-1)
    learned = [at for at in range(1, len(example.ids)) if example.learned[at]]
    return sum(float(values[at - 1, example.ids[at]]) for at in learned), len(learned)


def by_hand(task, model, example):
    """The loss of one pair, from logits in float64 and Python's own numbers."""
    gains = []
    for side in (example.chosen, example.rejected):
        adapted, count = log_probability(model, side)
        with model.disable_adapter():
            plain, _ = log_probability(model, side)
        gains.append((adapted - plain) / (count if task.loss == "ipo" else 1))
    margin = gains[0] - gains[1]
    if task.loss == "ipo":
        return (margin - 1 / (2 * task.beta)) ** 2
    likely = 1 / (1 + math.exp(-task.beta * margin))
    smoothing = task.label_smoothing
    return -(1 - smoothing) * math.log(likely) - smoothing * math.log(1 - likely)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.4},
        {"beta": 0.4, "label_smoothing": 0.2},
        {"loss": "ipo"},
        {"loss": "ipo", "beta": 0.5},
    ],
    ids=str,
)
def test_the_losses_are_those_of_the_formulas(set_up, options):
    own = set_up(OWN, count=4)
    own.task = task_of({"name": "dpo", **options})
    model = own.grown("a", exact=True, init_lora_weights=False).eval()
    losses, batch = own.loss(model, own.batch(0, 4))
    expected = [by_hand(own.task, model, example) for example in own.examples]
    assert losses[::2].tolist() == pytest.approx(expected, rel=1e-10)
    assert losses[1::2].tolist() == [0.0] * 4
    assert own.task.count(batch) == 4


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_loss_is_that_of_trl(set_up, tmp_path, loss):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    own = set_up(OWN, count=6)
    own.task = task_of({"name": "dpo", "loss": loss, "beta": 0.3})
    reference = copy.deepcopy(own.base)
    model = own.grown("a", init_lora_weights=False).eval()
    losses, batch = own.loss(model, own.batch(0, 6))
    expected = float(losses.sum() / own.task.count(batch))
    settings = {"report_to": [], "use_cpu": True, "bf16": False}
    own.tokenizer.pad_token = own.tokenizer.eos_token
    trainer = trl.DPOTrainer(
        model.merge_and_unload(),
        reference,
        trl.DPOConfig(str(tmp_path), beta=0.3, loss_type=[loss], max_length=48, **settings),
        train_dataset=datasets.Dataset.from_list(preferences(6)),
        processing_class=own.tokenizer,
    )
    rows = [trainer.train_dataset[n] for n in range(6)]
    found = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_reference_is_the_base_alone_without_dropout_and_draws_nothing(set_up):
    own = set_up(OWN, count=4)
    for layer in own.base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = own.grown("a", init_lora_weights=False, lora_dropout=0.5).train()
    state = torch.get_rng_state()
    batch = own.task.prepare(model, own.batch(0, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not batch.targets["reference"].requires_grad
    model.eval()
    with model.disable_adapter():
        expected = [log_probability(model, side)[0] for side in _sides(own.examples)]
    assert batch.targets["reference"].tolist() == pytest.approx(expected, rel=1e-5)


def _sides(examples):
    return [side for example in examples for side in (example.chosen, example.rejected)]


def test_no_second_model_is_held(set_up):
    own = set_up(OWN, count=4)
    model = own.grown("a")
    before = {id(p) for p in model.parameters()}
    own.task.prepare(model, own.batch(0, 4))
    assert {id(p) for p in model.parameters()} == before


def test_only_the_answers_are_learned(set_up):
    own = set_up(OWN)
    pair = Preference(Pair("Say 3:", " yes", 1), Pair("Say 3:", " no", 1), 1)
    ((example,), is_cut) = own.task.pieces(pair, own.tokenizer, 32)
    texts = [_learned(side, own.tokenizer) for side in (example.chosen, example.rejected)]
    assert texts == [" yes<|endoftext|>", " no<|endoftext|>"]
    assert not is_cut


def test_of_a_conversation_only_what_comes_after_the_prompt_is_learned(set_up):
    own = set_up(OWN)
    before = [("user", "one"), ("assistant", "two"), ("user", "three")]
    sides = [
        Chat(
            tuple({"role": r, "content": c} for r, c in [*before, ("assistant", last)]), 1, None, 3
        )
        for last in ("four", "five")
    ]
    ((example,), _) = own.task.pieces(Preference(*sides, 1), own.tokenizer, 64)
    chosen, rejected = (
        _learned(side, own.tokenizer) for side in (example.chosen, example.rejected)
    )
    assert "four" in chosen and "two" not in chosen
    assert "five" in rejected and "two" not in rejected
    template = own.tokenizer.chat_template
    own.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}.{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ((example,), _) = own.task.pieces(Preference(*sides, 1), own.tokenizer, 64)
    assert _learned(example.chosen, own.tokenizer) == "four."
    own.tokenizer.chat_template = template


def _learned(signed, tokenizer):
    return tokenizer.decode([token for token in signed if token >= 0])


def test_a_prompt_that_leaves_no_room_is_refused(set_up):
    own = set_up(OWN)
    pair = Preference(Pair("Say " * 20, " yes", 1), Pair("Say " * 20, " no", 1), 1)
    with pytest.raises(Refusal, match="fills `max_length`"):
        own.task.pieces(pair, own.tokenizer, 8)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"beta": 0}, "`beta` .*above 0"),
        ({"beta": "0.1"}, "`beta` .*above 0"),
        ({"beta": float("inf")}, "`beta` .*above 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "sigmiod"}, "'sigmiod'.*Nearest: `sigmoid`"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "goes with the loss `sigmoid`"),
        ({"betta": 0.1}, "no option `betta`. Nearest: `beta`"),
    ],
)
def test_options_are_checked(options, why):
    with pytest.raises(ConfigError, match=why):
        task_of({"name": "dpo", **options})


def test_an_untrained_adapter_has_no_reward_and_the_loss_of_a_coin(set_up):
    own = set_up(OWN, count=6)
    model = own.grown("a")
    losses, _ = own.loss(model.eval(), own.batch(0, 6))
    assert losses[::2].tolist() == pytest.approx([math.log(2)] * 6)
    found = own.task.measures(model, own.examples, pad=own.pad, batch_size=4)
    assert found == {"reward_accuracy": 0.0, "reward_margin": 0.0}


def test_rewards_are_of_each_pair(set_up):
    own = set_up(OWN, count=6)
    model = own.grown("a", exact=True, init_lora_weights=False).eval()
    found = own.task.measures(model, own.examples, pad=own.pad, batch_size=4)
    other = [Preferred(e.rejected, e.chosen) for e in own.examples]
    turned = own.task.measures(model, other, pad=own.pad, batch_size=4)
    assert found["reward_accuracy"] + turned["reward_accuracy"] == pytest.approx(1)
    losses = [by_hand(own.task, model, example) for example in own.examples]
    margins = [-math.log(math.exp(loss) - 1) for loss in losses]
    assert found["reward_margin"] == pytest.approx(sum(margins) / 6, rel=1e-4)
