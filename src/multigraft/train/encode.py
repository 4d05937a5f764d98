"""From records to tokens, and which of them are learned.

The prompt's tokens here are the ones that generation will see: where tokenising the text as a
whole would join characters across a boundary, each side is tokenised on its own.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from multigraft.errors import DataError
from multigraft.train.examples import Example
from multigraft.train.records import BadLine, Chat, Pair, Record, Refusal, Text

IGNORED = -100
"""The label of tokens that are not learned, as in torch's cross-entropy."""


Written = Pair | Chat | Text
"""Records that are text to go on with."""


@dataclass(frozen=True)
class Encoded(Example):
    """One example: token ids and, for each, whether it is learned."""

    ids: list[int]
    learned: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids that are learned, `IGNORED` elsewhere."""
        return [
            i if is_learned else IGNORED
            for i, is_learned in zip(self.ids, self.learned, strict=True)
        ]

    @property
    def signed(self) -> list[int]:
        """The ids, and ``-1 - id`` where a token is not learned."""
        return [i if flag else -1 - i for i, flag in zip(self.ids, self.learned, strict=True)]

    @classmethod
    def of_signed(cls, tokens: Sequence[int]) -> Encoded:
        """The example whose `signed` this is."""
        return cls([t if t >= 0 else -1 - t for t in tokens], [t >= 0 for t in tokens])

    def pack(self) -> bytes:
        return array("i", self.signed).tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> Encoded:
        return cls.of_signed(array("i", data))


@dataclass
class Encoding:
    """The examples of a file, and what had to be left out or cut."""

    examples: list[Encoded] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    cut: int = 0


@dataclass(frozen=True)
class Span:
    """A stretch of text that is learned, or not."""

    text: str
    learned: bool


def encode(records: Sequence[Record], tokenizer: Any, max_length: int, file: str = "") -> Encoding:
    """Tokenise records; examples of more than ``max_length`` tokens are cut at the end.

    Records that the chat template cannot render, or of which nothing learned is left after the
    cut, are reported in ``bad``.
    """
    result = Encoding()
    for record in records:
        try:
            pieces, is_cut = pieces_of(record, tokenizer, max_length)
        except Refusal as refusal:
            result.bad.append(refusal.at(file, record.line))
            continue
        result.cut += is_cut
        result.examples += pieces
    return result


def pieces_of(record: Record, tokenizer: Any, max_length: int) -> tuple[list[Encoded], bool]:
    """A record's examples, and whether something was cut from it.

    It is one example, cut at the end; only text, of which all is learned, goes on in further ones.

    Raises:
        Refusal: the chat template does not fit, or nothing learned is left after the cut.
    """
    try:
        whole = encode_one(record, tokenizer)
    except DataError as error:
        why, _, remedy = str(error).partition(". ")
        raise Refusal(why, remedy) from error
    starts = range(0, len(whole.ids), max_length) if isinstance(record, Text) else [0]
    pieces = [
        Encoded(whole.ids[at : at + max_length], whole.learned[at : at + max_length])
        for at in starts
    ]
    kept = [piece for piece in pieces if any(piece.learned[1:])]
    if not kept:
        why = f"what comes before the part to learn fills `max_length` (={max_length}) tokens"
        raise Refusal(why, "Shorten the prompt or raise the length")
    return kept, len(pieces) == 1 and len(whole.ids) > max_length


def encode_one(record: Record, tokenizer: Any) -> Encoded:
    """One record as tokens; pairs and texts end with the end-of-text token, which is learned too.

    Raises:
        DataError: the chat template is missing, or refuses these messages.
    """
    record = settled(record, tokenizer)
    if isinstance(record, Pair | Text):
        example = _tokenise(_spans(record), tokenizer, special=True)
        end = tokenizer.eos_token_id
        if end is None:
            return example
        if example.ids[-1:] == [end]:
            return Encoded(example.ids, [*example.learned[:-1], True])
        return Encoded([*example.ids, end], [*example.learned, True])
    _require_template(tokenizer)
    if _MARKED.search(_template_text(tokenizer)):
        return _by_template(record, tokenizer)
    return _tokenise(chat_spans(record, tokenizer), tokenizer, special=False)


def settled(record: Record, tokenizer: Any) -> Written:
    """The record itself; its plain form where the tokeniser has no chat template for it.

    Raises:
        DataError: a language model cannot learn from it.
    """
    if isinstance(record, Chat) and record.plain is not None:
        return record if getattr(tokenizer, "chat_template", None) else record.plain
    if not isinstance(record, Written):
        kind = type(record).__name__.lower()
        raise DataError(f"a {kind} record is no text to go on with. Choose another `task`")
    return record


def prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    """The tokens after which generation starts: the prompt, or all but the last turn."""
    record = settled(record, tokenizer)
    if isinstance(record, Pair | Text):
        prompt = record.prompt if isinstance(record, Pair) else ""
        ids = _ids(prompt, tokenizer, special=True)
        # Some tokenisers end every text; a prompt has to stay open.
        return ids[:-1] if ids[1:] and ids[-1] == tokenizer.eos_token_id else ids
    _require_template(tokenizer)
    return _ids(_render(tokenizer, record.messages[:-1], True), tokenizer, special=False)


def expected_text(record: Record) -> str:
    """What generation should give after `prompt_ids`."""
    if isinstance(record, Chat):
        return record.messages[-1]["content"]
    return record.completion if isinstance(record, Pair) else record.content


def chat_spans(record: Chat, tokenizer: Any) -> list[Span]:
    """The rendered conversation, cut where assistant turns begin and end.

    A turn begins where the prompt for it ends, so its header is not learned; it ends where the
    conversation up to it ends, so that the token which closes it is.

    Raises:
        DataError: the template does not render turns one after another.
    """
    whole = _render(tokenizer, record.messages, False)
    spans, done = [], 0
    for number, turn in enumerate(record.messages):
        if turn["role"] != "assistant" or number < record.given:
            continue
        before = _render(tokenizer, record.messages[:number], True)
        upto = _render(tokenizer, record.messages[: number + 1], False)
        if not (whole.startswith(before) and whole.startswith(upto) and len(before) < len(upto)):
            raise DataError(
                f"the chat template does not render turn {number + 1} by itself. Split the "
                "conversation so that this turn is its last, or mark assistant turns in the "
                "template with {% generation %}"
            )
        spans += [
            Span(whole[done : len(before)], False),
            Span(whole[len(before) : len(upto)], True),
        ]
        done = len(upto)
    return [*spans, Span(whole[done:], False)]


def _spans(record: Pair | Text) -> list[Span]:
    if isinstance(record, Text):
        return [Span(record.text, True)]
    return [Span(record.prompt, False), Span(record.completion, True)]


_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _tokenise(spans: Sequence[Span], tokenizer: Any, special: bool) -> Encoded:
    """The spans as one text if a token ends at every boundary, otherwise one by one."""
    if tokenizer.is_fast:
        text = "".join(span.text for span in spans)
        coded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        learned = _by_offsets(spans, coded["offset_mapping"])
        if learned is not None:
            return Encoded(list(coded["input_ids"]), learned)
    ids: list[int] = []
    flags: list[bool] = []
    for number, span in enumerate(spans):
        part = _ids(span.text, tokenizer, special and number == 0)
        if special and number == 0 and part[1:] and part[-1] == tokenizer.eos_token_id:
            part = part[:-1]
        ids += part
        flags += [span.learned] * len(part)
    return Encoded(ids, flags)


def _by_offsets(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> list[bool] | None:
    """For each token whether it is learned, or None if one lies across a boundary."""
    ends, position = [], 0
    for span in spans:
        position += len(span.text)
        ends.append((position, span.learned))
    learned, current = [], 0
    for begin, end in offsets:
        if begin == end:  # a special token that the tokeniser adds
            learned.append(False)
            continue
        while begin >= ends[current][0]:
            current += 1
        if end > ends[current][0]:
            return None
        learned.append(ends[current][1])
    return learned


def _by_template(record: Chat, tokenizer: Any) -> Encoded:
    coded = tokenizer.apply_chat_template(
        list(record.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    before = _render(tokenizer, record.messages[: record.given], True) if record.given else ""
    given = len(_ids(before, tokenizer, special=False))
    flags = [bool(flag) and at >= given for at, flag in enumerate(coded["assistant_masks"])]
    return Encoded(list(coded["input_ids"]), flags)


def _ids(text: str, tokenizer: Any, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], is_open: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=is_open
            )
        )
    except Exception as error:  # jinja's errors, raised by templates themselves, have no one root
        raise DataError(
            f"the chat template refuses the messages ({error}). Follow the order of roles that the "
            "model was made for"
        ) from error


def _template_text(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def _require_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokeniser has no chat template. Write prompt/completion lines, or use the "
            "instruction-tuned version of the model"
        )
