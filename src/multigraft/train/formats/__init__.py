"""Formats: how people write examples, one file each; a row's keys tell which it is.

    FORMATS.register("qa", Format("qa", ("question", "answer"), read, '{"question": …}'))

adds one of your own, to ``--format`` as well.
"""

from multigraft.errors import UnsupportedError
from multigraft.train.formats import (
    alpaca,
    labelled,
    labelled_pairs,
    messages,
    pairs,
    preference,
    related,
    scored,
    sharegpt,
    source_target,
    tagged,
    text,
)
from multigraft.train.formats.contract import FORMATS, Format, Kinds, Values, require
from multigraft.train.records import LANGUAGE, Record

AUTO = "auto"

# The order is that of recognition: data sets of conversations often have a `prompt` column besides.
_LANGUAGE = (messages, sharegpt, alpaca, pairs, source_target, text)
for _each in (*_LANGUAGE, labelled_pairs, labelled, tagged, scored, related, preference):
    FORMATS.register(_each.FORMAT.name, _each.FORMAT)

__all__ = ["AUTO", "FORMATS", "Format", "Kinds", "check_format", "formats", "read_row"]


def formats() -> list[str]:
    """Names of all formats, ``auto`` first."""
    return [AUTO, *FORMATS]


def check_format(format: str, kinds: Kinds) -> None:
    """Fail when there is no such format, or when it gives no record of these kinds.

    Raises:
        UnsupportedError: with the formats that do.
    """
    if format != AUTO and not _gives(FORMATS[format], kinds):
        known = ", ".join(f"`{name}`" for name, each in FORMATS.items() if _gives(each, kinds))
        raise UnsupportedError(
            f"`format` (={format!r}) gives nothing that this task learns from. It takes {known}."
        )


def read_row(row: Values, line: int, format: str = AUTO, kinds: Kinds = LANGUAGE) -> Record:
    """A row as a record.

    Args:
        format: which one it has, or ``"auto"`` to go by its keys.
        kinds: of records that are looked for.

    Raises:
        Refusal: the row is not of that format, or of none.
        UnsupportedError: there is no such format.
    """
    chosen = FORMATS[format] if format != AUTO else _recognised(row, kinds)
    require(row, chosen)
    return chosen.read(row, line)


def _gives(format: Format, kinds: Kinds) -> bool:
    return any(kind in kinds for kind in format.makes)


def _recognised(row: Values, kinds: Kinds) -> Format:
    """The first format whose keys are all there; otherwise the one that lacks the fewest of them.

    A row with keys of none is told what pairs need, the simplest format of language models, or the
    last format of others.
    """
    known = [each for _, each in FORMATS.items() if _gives(each, kinds)]
    whole = next((each for each in known if each.fits(row)), None)
    if whole is not None:
        return whole
    part = [each for each in known if any(key in row for key in each.keys)]
    if part:
        return min(part, key=lambda each: sum(key not in row for key in each.keys))
    return pairs.FORMAT if pairs.FORMAT in known else known[-1]
