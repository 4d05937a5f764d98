"""Words and a tag for each, as in the recognition of names."""

from __future__ import annotations

from typing import Any

from multigraft.train.formats.contract import Format, Values, kind, nested
from multigraft.train.formats.labelled import key_of, label
from multigraft.train.records import Refusal, Tagged

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels")


def read(row: Values, line: int) -> Tagged:
    """One sentence.

    Raises:
        Refusal: there are not as many tags as words, or one is not what it should be.
    """
    words_key, tags_key = key_of(row, WORDS), key_of(row, TAGS)
    words, tags = _list(row, words_key), _list(row, tags_key)
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word.strip():
            shown = "empty" if isinstance(word, str) else f"{kind(word)}, not a string"
            raise Refusal(f"entry {number} of `{words_key}` is {shown}", "Give one word an entry")
    if len(words) != len(tags):
        why = f"`{words_key}` has {len(words)} entries and `{tags_key}` {len(tags)}"
        raise Refusal(why, "Give one tag a word")
    names = (label(tag, f"entry {n} of `{tags_key}`") for n, tag in enumerate(tags, start=1))
    return Tagged(tuple(words), tuple(names), line)


def _list(row: Values, key: str) -> list[Any]:
    found = nested(row[key])
    if not isinstance(found, list | tuple) or not found:
        shown = "empty" if isinstance(found, list | tuple) else f"{kind(found)}, not a list"
        raise Refusal(f"`{key}` is {shown}", "Give a list with one entry a word")
    return list(found)


FORMAT = Format(
    "tagged",
    ("tokens", "tags"),
    read,
    '{"tokens": ["Ada", "sang"], "tags": ["B-PER", "O"]}',
    (Tagged,),
    tuple((words, tags) for words in WORDS for tags in TAGS),
)
