"""Examples as people read them: the text of their tokens, and what of it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multigraft.train.encode import Encoded, Span


def spans_of(example: Encoded, tokenizer: Any) -> list[Span]:
    """The text of an example's tokens, cut where learning begins and ends.

    The first token is never predicted, so it is not learned whatever its flag says.
    """
    flags = [False, *example.learned[1:]]
    ends = [at for at in range(1, len(flags)) if flags[at] != flags[at - 1]] + [len(flags)]
    spans, start, before = [], 0, ""
    for end in ends:
        upto = decoded(example.ids[:end], tokenizer)
        # From a prefix to a prefix, since decoders drop the space in front of a text's first word.
        is_longer = upto.startswith(before)
        text = upto[len(before) :] if is_longer else decoded(example.ids[start:end], tokenizer)
        spans.append(Span(text, flags[start]))
        start, before = end, upto
    return spans


def decoded(ids: Sequence[int], tokenizer: Any) -> str:
    """Text with special tokens by name, and no spaces taken away."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
