"""What can go wrong, as a tree; catch the root, or the built-in beside it.

    MultigraftError
    ├── ConfigError (ValueError)        a config that cannot mean anything
    ├── TargetError (ValueError)        a config that means nothing, or the wrong thing, on a model
    ├── AdapterNameError (ValueError)   a name that exists already, is unknown, or breaks a path
    ├── NestingError (ValueError)       a graft on a graft
    ├── StateError (RuntimeError)       an operation that the present state forbids
    ├── MergeError (ValueError)         a merge whose result would not be finite
    ├── RoutingError (ValueError)       a mixed batch whose rows cannot be served
    ├── UnsupportedError (ValueError)   a thing that we know and do not do
    ├── CheckpointError (RuntimeError)  files that are damaged or that fit another model
    │   └── SourceError (ValueError)    files that are not where they are said to be
    ├── DataError (ValueError)          training data that cannot be used, line by line
    ├── TrainingError (RuntimeError)    a training run that cannot begin or go on
    ├── MissingExtraError (ImportError) an optional package that is not installed
    └── AliasError (ModuleNotFoundError) a name of PEFT's that its alias does not have

Every message says where, what was given, what is required and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MultigraftError(Exception):
    """Root of every error that this library raises on purpose."""


class ConfigError(MultigraftError, ValueError):
    """A config's value is outside what the field allows."""


class TargetError(MultigraftError, ValueError):
    """A config names sites that the model lacks, or that cannot be adapted."""


class AdapterNameError(MultigraftError, ValueError):
    """An adapter's name is taken, unknown, or not usable as a folder's name."""


class NestingError(MultigraftError, ValueError):
    """An adapted layer was about to be placed in or around another one."""


class StateError(MultigraftError, RuntimeError):
    """The operation needs another state of the model: merged, unmerged, attached."""


class MergeError(MultigraftError, ValueError):
    """What would be written into the base is NaN or infinite; nothing was merged."""


class RoutingError(MultigraftError, ValueError):
    """A mixed batch names rows or adapters that cannot be served."""


class UnsupportedError(MultigraftError, ValueError):
    """A known option, layer or method that is not built, or that cannot be combined."""


class CheckpointError(MultigraftError, RuntimeError):
    """An adapter's files are incomplete, damaged, or belong to another base model."""


class SourceError(CheckpointError, ValueError):
    """Files cannot be had from, or brought to, a folder or the hub. (PEFT raises `ValueError`.)"""

    lacks_file = False
    """Whether the place is there, as far as is known, and the file is not."""
    is_cut_off = False
    """Whether the hub was asked and did not answer: asking again takes as long."""


class DataError(MultigraftError, ValueError):
    """Training data holds lines that cannot be used; the message lists them."""


class TrainingError(MultigraftError, RuntimeError):
    """A training run cannot begin, or diverged; no file was written."""


class MissingExtraError(MultigraftError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class AliasError(MultigraftError, ModuleNotFoundError):
    """Something was imported from PEFT that Multigraft, standing for PEFT, does not have."""


class MultigraftWarning(UserWarning):
    """Something the caller may want to act on; nothing was refused."""


PeftError = MultigraftError
PeftWarning = MultigraftWarning
NoMatchingPeftModuleError = TargetError
"""PEFT's names for the above, for scripts that catch them."""


def close_to(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Those of ``known`` that are spelt most like ``name``, nearest first."""
    spellings: dict[str, list[str]] = {}
    for each in known:  # whatever the case: LORA is what `lora` means
        spellings.setdefault(each.lower(), []).append(each)
    found = difflib.get_close_matches(name.lower(), spellings, n=limit, cutoff=0.5)
    return [each for key in found for each in spellings[key]][:limit]


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """`` Nearest: `a`, `b`.`` for the names most like ``name``, or an empty string."""
    nearest = close_to(name, known, limit)
    return f" Nearest: {', '.join(f'`{n}`' for n in nearest)}." if nearest else ""


def nearest_of(names: Sequence[str], known: Iterable[str], limit: int = 8) -> str:
    """What `did_you_mean` says of the first of these; a file may name thousands."""
    known = list(known)
    return "".join(did_you_mean(name, known) for name in names[:limit])


def listed(names: Sequence[str], limit: int = 8) -> str:
    """```a`, `b` and 3 more``."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return f"{', '.join(f'`{name}`' for name in names[:limit])}{more}"


def there_are(known: Iterable[str], limit: int = 8) -> str:
    """`` There are: `a`, `b` and 3 more.`` for what could have been named."""
    names = sorted(set(known))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f" There are: {', '.join(f'`{n}`' for n in names[:limit])}{more}." if names else ""
