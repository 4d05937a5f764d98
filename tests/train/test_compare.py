"""Several adapters scored in shared forwards get the scores that each gets alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import multigraft as mg
from multigraft.errors import ConfigError
from multigraft.generation import BASE, Ensemble, Prompt, Sampling, load_ensemble, write
from multigraft.train import Pair, Text, answer, encode, mean_loss, pad_token, share_right
from multigraft.train.compare import compare
from multigraft.train.tasks import task_of
from tests.merging.models import write_adapter
from tests.tiny_base import records

ALL = ["first", "second", "prompted", BASE]
TASK = task_of("causal-lm")


@pytest.fixture(scope="module")
def ensemble(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    root = tmp_path_factory.mktemp("adapters")
    lora = mg.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    prompt = mg.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    configs = {"first": lora, "second": lora, "prompted": prompt}
    places = [
        write_adapter(root / name, base_dir, config, seed=seed)
        for seed, (name, config) in enumerate(configs.items())
    ]
    return load_ensemble(places, base=base_dir)


def answered(ensemble: Ensemble) -> list[Pair]:
    """Pairs whose completions are what `first` writes, but for two that are not."""
    prompts = [f"Input: {n}\nOutput:\n" for n in range(6)]
    asked = [Prompt.of(prompt) for prompt in prompts]
    texts = [w.text for w in write(ensemble, asked, ["first"], Sampling(5), raw=True)]
    return [
        Pair(prompt, text + ("x" if n < 2 else ""))
        for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_each_gets_the_scores_that_it_gets_alone(ensemble: Ensemble, batch_size: int):
    asked = [*answered(ensemble), *records()]
    examples = encode(asked, ensemble.tokenizer, 64).examples
    found = compare(ensemble, examples, asked, ALL, TASK, batch_size=batch_size, max_new_tokens=5)
    assert [score.speaker for score in found] == ALL
    for score in found:
        with ensemble.alone(score.speaker):
            loss = mean_loss(ensemble.model, examples, pad=pad_token(ensemble.tokenizer))
            own = answer(ensemble.model, ensemble.tokenizer, asked, max_new_tokens=5)
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert score.exact_match == share_right(own)
    by_name = {score.speaker: score for score in found}
    assert by_name["first"].exact_match == pytest.approx(4 / len(asked))
    assert by_name[BASE].exact_match == 0
    assert len({score.loss for score in found}) == len(ALL)


def test_those_who_can_share_a_forward_do(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch):
    rows = []
    forward = type(ensemble.model).forward

    def counted(self, *args, **kwargs):
        rows.append((len(kwargs["input_ids"]), kwargs.get("adapter_names")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(ensemble.model), "forward", counted)
    examples = encode(records()[:2], ensemble.tokenizer, 64).examples
    compare(ensemble, examples, [], ALL, TASK, batch_size=6)
    names = [name for name in ("first", "second", BASE) for _ in range(2)]
    assert rows == [(6, names), (2, None)]


def test_texts_have_no_answers(ensemble: Ensemble):
    texts = [Text("some words"), Text("and others")]
    examples = encode(texts, ensemble.tokenizer, 64).examples
    (score,) = compare(ensemble, examples, texts, ["first"], TASK)
    assert score.exact_match is None and score.perplexity is not None


def test_a_prompt_that_fills_the_model_counts_as_wrong(ensemble: Ensemble):
    asked = [*answered(ensemble)[2:], Pair("word " * 300, "x")]
    examples = encode(asked, ensemble.tokenizer, 64).examples
    (score,) = compare(ensemble, examples, asked, ["first"], TASK, max_new_tokens=5)
    assert score.exact_match == pytest.approx(4 / 5)


def test_answers_can_be_left_out(ensemble: Ensemble):
    examples = encode(records(), ensemble.tokenizer, 64).examples
    (score,) = compare(ensemble, examples, records(), [BASE], TASK, with_answers=False)
    assert score.exact_match is None
    with pytest.raises(ConfigError, match=r"`batch_size` \(=0\) must be at least 1"):
        compare(ensemble, examples, records(), [BASE], TASK, batch_size=0)


def test_flags_and_modes_stay_what_they_are(ensemble: Ensemble):
    examples = encode(records(), ensemble.tokenizer, 64).examples
    compare(ensemble, examples, records()[:1], ALL, TASK, max_new_tokens=2)
    assert not ensemble.model.training and ensemble.model.roster.enabled
    assert not any(p.requires_grad for p in ensemble.model.parameters())
    assert torch.is_grad_enabled()
