"""An adapter for another program: its rules checked, and rewritten what can be so exactly."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from multigraft.atomic import write_files
from multigraft.config import PeftConfig
from multigraft.errors import StateError
from multigraft.exchange.base import check_on_base, copies_of_base, named_base
from multigraft.exchange.contract import CONSUMERS, Adapter, Options, Outcome
from multigraft.exchange.plain import pairs_of, refuse_rest
from multigraft.inspection.files import read_adapter

Pathlike = str | os.PathLike[str]


def export(
    adapter: Pathlike,
    consumer: str,
    output: Pathlike,
    *,
    base: Pathlike | None = None,
    allow_pickle: bool = False,
) -> Outcome:
    """Write an adapter so that a program reads all of it: no tensor and no scale is dropped.

    Args:
        adapter: a directory, or an id on the hub.
        consumer: ``"vllm"``, ``"sglang"``, ``"gguf"`` (llama.cpp) or ``"ollama"``.
        output: the directory for the new files.
        base: the base model, a directory or an id on the hub. Names and sizes are compared with
            its ``config.json``, and tensors of the base in the adapter's file with its weights.
        allow_pickle: read ``adapter_model.bin`` as well.

    Returns:
        What was written, what was rewritten, and what to mind.

    Raises:
        UnsupportedError: the program cannot do what the adapter does; nothing was written.
        CheckpointError: files are damaged, or do not fit the base.
    """
    rules = CONSUMERS[consumer.lower()]
    target = Path(output).expanduser()
    options = Options(base=None if base is None else os.fspath(base), allow_pickle=allow_pickle)
    files = read_adapter(adapter, allow_pickle=allow_pickle)
    _check_target(target, files.folder)
    outcome = Outcome(str(target))
    where = str(files.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_dict(files.values)
    pairs, rest = pairs_of(config, files.tensors, where)
    dropped = copies_of_base(rest, named_base(files.values, options.base)) if rest else []
    refuse_rest(where, {name: t for name, t in rest.items() if name not in dropped})
    if dropped:
        outcome.done.append(f"left out {', '.join(dropped)}, which the base holds bit for bit")
    if options.base is not None:
        sizes = {s: (p.A.shape[1], p.B.shape[0]) for s, p in pairs.items() if p.A.ndim == 2}
        check_on_base(sizes, options.base, where)
    found = Adapter(files.folder, files.values, pairs)
    written = rules.prepare(found, target, options, outcome)
    write_files(written)
    outcome.files = sorted(path.name for path in written)
    return outcome


def _check_target(target: Path, source: Path) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise StateError(
            f"{target} is where the adapter lies, and exporting would replace it. Name another "
            "directory."
        )
