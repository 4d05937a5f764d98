"""From records to tokens: what is learned, and what generation will see."""

from __future__ import annotations

import pytest

from multigraft import DataError
from multigraft.train import Chat, Pair, encode, encode_one, load_tokenizer, prompt_ids
from multigraft.train.encode import IGNORED
from tests.tiny_base import write_base

USER = {"role": "user", "content": "4 July 2016"}
ASSISTANT = {"role": "assistant", "content": "2016-07-04"}
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}!{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


def learned_text(tokenizer, example) -> list[str]:
    """The stretches that are learned, as text."""
    stretches: list[list[int]] = []
    last = False
    for token, learned in zip(example.ids, example.learned, strict=True):
        if learned:
            stretches = stretches if last else [*stretches, []]
            stretches[-1].append(token)
        last = learned
    return [tokenizer.decode(ids) for ids in stretches]


def test_a_pair_learns_its_completion_and_the_end(tokenizer):
    example = encode_one(Pair("Input: a\nOutput:\n", "b c"), tokenizer)
    assert tokenizer.decode(example.ids) == "Input: a\nOutput:\nb c<|endoftext|>"
    assert learned_text(tokenizer, example) == ["b c<|endoftext|>"]


def test_labels_are_the_ids_where_learned_and_ignored_elsewhere(tokenizer):
    example = encode_one(Pair("Input: a\n", "b"), tokenizer)
    assert IGNORED in example.labels
    for token, label, learned in zip(example.ids, example.labels, example.learned, strict=True):
        assert label == (token if learned else IGNORED)


def test_the_prompt_is_tokenised_as_generation_will_see_it(tokenizer):
    # As one text, "de" and "f" join in a token; then the completion could never be generated.
    assert (
        tokenizer("def")["input_ids"] != tokenizer("de")["input_ids"] + tokenizer("f")["input_ids"]
    )
    for prompt, completion in [("de", "f"), ("year 19", "84"), ("self.", "name"), ("a ", " b")]:
        pair = Pair(prompt, completion)
        example = encode_one(pair, tokenizer)
        start = prompt_ids(pair, tokenizer)
        assert example.ids[: len(start)] == start
        assert example.learned == [False] * len(start) + [True] * (len(example.ids) - len(start))


def test_a_chat_learns_every_assistant_turn_and_nothing_else(tokenizer):
    second = {"role": "assistant", "content": "done"}
    chat = Chat((USER, ASSISTANT, {"role": "user", "content": "thanks"}, second))
    example = encode_one(chat, tokenizer)
    whole = tokenizer.apply_chat_template(list(chat.messages), tokenize=False)
    assert tokenizer.decode(example.ids) == whole
    assert learned_text(tokenizer, example) == ["2016-07-04<|endoftext|>\n", "done<|endoftext|>\n"]


def test_a_chats_prompt_is_what_comes_before_its_answer(tokenizer):
    chat = Chat((USER, ASSISTANT))
    ids = prompt_ids(chat, tokenizer)
    assert tokenizer.decode(ids) == "Input: 4 July 2016\nOutput:\n"
    assert encode_one(chat, tokenizer).ids[: len(ids)] == ids


def test_a_template_that_marks_what_is_generated_is_believed(tokenizer):
    tokenizer.chat_template = MARKED
    example = encode_one(Chat((USER, ASSISTANT)), tokenizer)
    assert learned_text(tokenizer, example) == ["2016-07-04!"]


def test_a_template_that_does_not_go_turn_by_turn_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"does not render turn 2 by itself\. Split"):
        encode_one(Chat((USER, ASSISTANT, USER, ASSISTANT)), tokenizer)


def test_what_a_template_refuses_is_passed_on(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode_one(Chat((USER, ASSISTANT)), tokenizer)


def test_a_tokeniser_without_a_template_cannot_do_chats_but_pairs(tmp_path):
    tokenizer = load_tokenizer(write_base(tmp_path, template=False))
    coded = encode([Pair("p", "c", 1), Chat((USER, ASSISTANT), 2)], tokenizer, 64, "d.jsonl")
    assert len(coded.examples) == 1
    (bad,) = coded.bad
    assert str(bad).startswith("d.jsonl:2: the tokeniser has no chat template. Write prompt/comp")


def test_long_examples_are_cut_and_counted(tokenizer):
    pair = Pair("Input: a\n", "b " * 50)
    coded = encode([pair, Pair("Input: a\n", "b")], tokenizer, 20)
    assert [len(e.ids) for e in coded.examples] == [20, len(coded.examples[1].ids)]
    assert coded.examples[0].ids == encode_one(pair, tokenizer).ids[:20]
    assert coded.cut == 1


def test_an_example_whose_completion_is_cut_off_whole_is_reported(tokenizer):
    coded = encode([Pair("word " * 50, "b", 7)], tokenizer, 20, "d.jsonl")
    assert not coded.examples
    assert str(coded.bad[0]).startswith("d.jsonl:7: what comes before the part to learn fills")
