"""Several speakers answer in shared batches what each answers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from multigraft.errors import AdapterNameError, CheckpointError, ConfigError, MultigraftWarning
from multigraft.generation import (
    BASE,
    Ensemble,
    Prompt,
    Sampling,
    load_ensemble,
    plain_prompts,
    write,
)
from multigraft.generation.write import Stream

PROMPTS = plain_prompts(["Input: 3", "a longer question, which pads the other", "7\n", "", "8"])
SHORT = Sampling(max_new_tokens=8)
ALL = ["first", "second", "scaled", "prompted", BASE]


@pytest.mark.parametrize("sampling", [SHORT, Sampling(8, temperature=1.0, top_p=0.9, seed=5)])
def test_side_by_side_is_as_alone(ensemble: Ensemble, sampling: Sampling):
    together = list(write(ensemble, PROMPTS, ALL, sampling))
    assert [(w.prompt, w.speaker) for w in together] == [(n, s) for n in range(4) for s in ALL]
    for speaker in ALL:
        alone = list(write(ensemble, PROMPTS, [speaker], sampling, batch_size=1))
        assert [w.text for w in alone] == [w.text for w in together if w.speaker == speaker]
    texts = {w.speaker: w.text for w in together if w.prompt == 0}
    assert len(set(texts.values())) == len(ALL)  # and each says something else


def test_those_who_can_share_a_batch_do(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch):
    calls = []
    generate = type(ensemble.model).generate

    def counted(self, *args, **kwargs):
        calls.append((len(kwargs["input_ids"]), kwargs.get("adapter_names")))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(ensemble.model), "generate", counted)
    list(write(ensemble, PROMPTS[:2], ALL, SHORT))
    mixed = ["first", "second", "scaled", BASE]
    assert calls == [(8, mixed * 2), (2, None)]


def test_another_seed_and_another_prompt_draw_other_numbers(ensemble: Ensemble):
    twice = [PROMPTS[0], PROMPTS[0]]
    texts = [
        [w.text for w in write(ensemble, twice, ["first"], Sampling(8, temperature=2.0, seed=s))]
        for s in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_what_is_streamed_adds_up_to_the_texts(ensemble: Ensemble):
    said: dict[int, str] = {}

    def hear(row: int, text: str) -> None:
        said[row] = said.get(row, "") + text

    done = list(write(ensemble, PROMPTS, ALL, SHORT, batch_size=7, on_text=hear))
    assert [said.get(n, "") for n in range(len(done))] == [w.text for w in done]


def test_half_a_character_waits_for_its_rest(ensemble: Ensemble):
    import torch

    text = "naïve ☃, 漢字 and 🦎"
    pieces: list[str] = []
    stream = Stream([ensemble.tokenizer], {0}, lambda row, piece: pieces.append(piece))
    stream.put(torch.zeros(1, 3))
    for token in ensemble.tokenizer(text)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3


def test_the_end_of_an_answer_is_no_part_of_it(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch):
    first = next(write(ensemble, PROMPTS[:1], ["first"], Sampling(4)))
    ids = ensemble.tokenizer(first.text)["input_ids"]
    assert (first.tokens, first.is_finished) == (4, False)
    own = ensemble.model.get_base_model().generation_config
    monkeypatch.setattr(own, "eos_token_id", [ids[-1], 0])
    cut = next(write(ensemble, PROMPTS[:1], ["first"], Sampling(64)))
    assert cut.is_finished and cut.tokens <= 4 and first.text.startswith(cut.text)


def test_the_chat_template_is_used_unless_told_otherwise(ensemble: Ensemble):
    tokenizer = ensemble.tokenizer
    prompt = Prompt.of("three", system="short")
    assert tokenizer.decode(prompt.ids(tokenizer)) == "Input: short\nInput: three\nOutput:\n"
    assert tokenizer.decode(prompt.ids(tokenizer, raw=True)) == "short\nthree"


def test_a_prompt_without_room_for_an_answer_is_told(ensemble: Ensemble):
    with pytest.raises(ConfigError, match=r"prompt 1 has \d+ tokens; the model takes 128"):
        list(write(ensemble, plain_prompts(["word " * 200]), ["first"], SHORT))


def test_a_prompt_near_the_models_end_cuts_its_own_answer_alone(ensemble: Ensemble):
    both = plain_prompts(["word " * 55, "one"])
    long, short = write(ensemble, both, ["first"], Sampling(40))
    assert long.tokens + len(both[0].ids(ensemble.tokenizer)) == 128
    assert short.tokens == 40


def test_names_that_nobody_has_are_told(ensemble: Ensemble, adapters):
    with pytest.raises(AdapterNameError, match="Nearest: `second`"):
        list(write(ensemble, PROMPTS, ["secnd"], SHORT))
    assert ensemble.require(["base", "first", "base"]) == [BASE, "first"]
    with pytest.raises(CheckpointError, match="neither a base model nor an adapter"):
        load_ensemble([])


def test_a_base_alone_answers(base_dir):
    alone = load_ensemble([], base=base_dir)
    assert alone.adapters == []
    assert next(write(alone, PROMPTS[:1], [BASE], SHORT)).text


def with_tokenizer(folder: Path, base_dir: Path, template: str | None, eos: str | None = None):
    """Put the base's tokeniser beside an adapter, with another template and another end."""
    settings = json.loads((base_dir / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    settings |= {"eos_token": eos} if eos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(base_dir / "tokenizer.json", folder / "tokenizer.json")


def test_each_adapter_is_asked_by_the_template_beside_it(base_dir: Path, adapters, tmp_path: Path):
    places = [Path(shutil.copytree(adapters[n], tmp_path / n)) for n in ("first", "second")]
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    with_tokenizer(places[0], base_dir, template, eos="<|pad|>")
    both = load_ensemble(places, base=base_dir)
    decode = both.tokenizer.decode
    asked = {n: decode(PROMPTS[0].ids(both.tokenizer_of(n))) for n in ("first", "second")}
    assert asked == {"first": "<Input: 3>", "second": "Input: Input: 3\nOutput:\n"}
    found = {w.speaker: w.text for w in write(both, PROMPTS[:1], both.adapters, SHORT)}
    plain = load_ensemble(list(map(str, [adapters["first"], adapters["second"]])), base=base_dir)
    wanted = [w.text for w in write(plain, PROMPTS[:1], ["second"], SHORT)]
    assert found["second"] == wanted[0]
    raw = Prompt.of("<Input: 3>")
    assert found["first"] == next(write(plain, [raw], ["first"], SHORT, raw=True)).text
    assert both.common_tokenizer is both.tokenizer  # they differ
    with_tokenizer(places[1], base_dir, template)
    assert load_ensemble(places, base=base_dir).common_tokenizer.chat_template == template
    (places[1] / "tokenizer_config.json").write_text("{")
    with pytest.warns(MultigraftWarning, match="beside the adapter cannot be read"):
        assert set(load_ensemble(places, base=base_dir).own) == {"first"}


def test_an_adapter_with_tokens_of_its_own_gets_room_for_them(base_dir: Path, tmp_path: Path):
    from multigraft import LoraConfig, get_peft_model
    from multigraft.train import load_model

    model = load_model(base_dir)
    model.resize_token_embeddings(1800)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "new")
    with pytest.warns(MultigraftWarning, match=r"`new` has a vocabulary of 1,800.*from 1,792"):
        found = load_ensemble([tmp_path / "new"], base=base_dir)
    assert found.model.get_base_model().config.vocab_size == 1800
    assert len(list(write(found, PROMPTS[:1], ["new", BASE], SHORT))) == 2
