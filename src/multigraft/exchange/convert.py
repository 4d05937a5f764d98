"""LoRA files from one format into another, tensors unchanged."""

from __future__ import annotations

import os
from pathlib import Path

from multigraft.atomic import write_files
from multigraft.errors import CheckpointError, StateError, UnsupportedError, listed
from multigraft.exchange.contract import FORMATS, Format, Options, Outcome
from multigraft.reading import PICKLE_ENDINGS, read_header, read_tensors

Pathlike = str | os.PathLike[str]


def convert(
    source: Pathlike,
    to: str,
    output: Pathlike,
    *,
    part: str | None = None,
    base: Pathlike | None = None,
    allow_pickle: bool = False,
) -> Outcome:
    """Read a LoRA in whatever format it is, and write it in another.

    Args:
        source: a folder in PEFT's format, or a file of diffusers, kohya's scripts or llama.cpp.
        to: ``"peft"``, ``"diffusers"``, ``"kohya"`` or ``"gguf"``.
        output: the folder of a PEFT adapter (one folder a model below it, where the file has
            several), or else the file.
        part: the model that a PEFT adapter is of (``"unet"``, ``"text_encoder"``, …), where its
            paths do not tell.
        base: where the base's ``config.json`` is, for GGUF.
        allow_pickle: read ``.bin``, ``.pt`` and ``.ckpt`` files as well.

    Raises:
        CheckpointError: files are damaged, or of no format that is read.
        UnsupportedError: the other format cannot say it; nothing was written.
    """
    wanted = FORMATS[to.lower()]
    origin, target = Path(source).expanduser(), Path(output).expanduser()
    base = None if base is None else os.fspath(base)
    options = Options(part, base, allow_pickle)
    form = _format_of(origin, allow_pickle)
    _check_target(origin, target, wanted)
    loras = form.read(origin, options)
    files = wanted.write(loras, target, options)
    write_files(files)
    outcome = Outcome(str(target if wanted.is_folder else target.parent), notes=[])
    root = Path(outcome.target)
    outcome.files = sorted(str(path.relative_to(root)) for path in files)
    count = sum(map(len, loras.parts.values()))
    models = listed([part for part in loras.parts if part])
    said = f" of {models}" if models else ""
    outcome.done = [f"{form.name} to {wanted.name}: {count} pairs{said}", *loras.notes]
    return outcome


def _format_of(source: Path, allow_pickle: bool) -> Format:
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file or directory. Name a LoRA.")
    names: list[str] = []
    gguf = FORMATS["gguf"]
    if source.is_file():
        if gguf.recognises(source, ()):
            return gguf
        if source.suffix in PICKLE_ENDINGS:
            names = list(read_tensors(source, allow_pickle=allow_pickle))
        else:
            names = list(read_header(source).tensors)
    found = [form for _, form in FORMATS.items() if form.recognises(source, names)]
    if len(found) == 1:
        return found[0]
    what = "of two formats at once" if found else f"none of {listed(sorted(FORMATS))}"
    beside = " Name the folder rather than the file." if source.name.startswith("adapter_") else ""
    raise UnsupportedError(
        f"{source} is {what}.{beside} `multigraft doctor` says more about what it holds."
    )


def _check_target(source: Path, target: Path, wanted: Format) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise StateError(f"{target} is what is read, and would be replaced. Name another place.")
    if target.is_dir() and not wanted.is_folder:
        raise StateError(f"{target} is a directory, and {wanted.name} is one file. Name a file.")
