"""Formats: how people write examples, one file each; a row's keys tell which it is.

    FORMATS.register("qa", Format("qa", ("question", "answer"), read, '{"question": …}'))

adds one of your own, to ``--format`` as well.
"""

from multigraft.train.formats import alpaca, messages, pairs, sharegpt, text
from multigraft.train.formats.contract import FORMATS, Format, Values, require
from multigraft.train.records import Record

AUTO = "auto"

# The order is that of recognition: data sets of conversations often have a `prompt` column besides.
for _each in (messages, sharegpt, alpaca, pairs, text):
    FORMATS.register(_each.FORMAT.name, _each.FORMAT)

__all__ = ["AUTO", "FORMATS", "Format", "formats", "read_row"]


def formats() -> list[str]:
    """Names of all formats, ``auto`` first."""
    return [AUTO, *FORMATS]


def read_row(row: Values, line: int, format: str = AUTO) -> Record:
    """A row as a record.

    Args:
        format: which one it has, or ``"auto"`` to go by its keys.

    Raises:
        Refusal: the row is not of that format, or of none.
        UnsupportedError: there is no such format.
    """
    chosen = FORMATS[format] if format != AUTO else _recognised(row)
    require(row, chosen)
    return chosen.read(row, line)


def _recognised(row: Values) -> Format:
    """The first format whose keys are all there; otherwise the one that lacks the fewest of them.

    A row with keys of none is told what pairs need, the simplest format.
    """
    known = [each for _, each in FORMATS.items()]
    whole = next((each for each in known if all(key in row for key in each.keys)), None)
    if whole is not None:
        return whole
    part = next((each for each in known if any(key in row for key in each.keys)), None)
    return part or pairs.FORMAT
