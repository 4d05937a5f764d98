"""The doctor: examine an adapter's files, mend what can be mended, and examine the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from multigraft.atomic import write_files, write_utf8
from multigraft.diagnosis.checks import CHECKS
from multigraft.diagnosis.findings import Diagnosis, Finding
from multigraft.diagnosis.patient import Patient, admit
from multigraft.diagnosis.treatment import Treatment, fixed, made_plain
from multigraft.errors import CheckpointError, UnsupportedError
from multigraft.reading import CONFIG_NAME, WEIGHTS_NAME
from multigraft.writing import write_tensors

BACKUP = ".bak"


def doctor(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | nn.Module | None = None,
    *,
    fix: bool = False,
    un_nest: bool = False,
    drop_nested: bool = False,
    nested: Sequence[str | os.PathLike[str]] = (),
    output: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    allow_pickle: bool = False,
    **where: Any,
) -> Diagnosis:
    """Examine an adapter's files without loading the base, and mend them if asked to.

    Nothing is written unless ``fix``, ``un_nest`` or ``drop_nested`` finds something to do. Then
    the old files are kept beside the new ones, as ``.bak``, unless ``output`` is given.

    Args:
        adapter: a directory, a single file of tensors, or an id on the hub.
        base: the base model: a directory or an id on the hub, of which the config alone is read;
            or a model, on whatever device.
        fix: rewrite what is safe to rewrite.
        un_nest: make adapters inside adapters plain, where there is a plain one that is equal.
        drop_nested: make them plain by leaving out what is inside.
        nested: folders of the adapters inside, whose configs give their scales; those beside the
            files are found.
        output: a directory for the new files.
        adapter_name: whose tensors count, in a file that holds those of several.
        allow_pickle: read ``.bin`` files as well.
        where: `subfolder`, `revision` and others of huggingface_hub.

    Returns:
        What was found; after mending, what is still there.

    Raises:
        CheckpointError: there is no adapter there, or the result cannot be written.
        AdapterNameError: the file names adapters, and ``adapter_name`` is none of them.
    """
    model = _skeleton(base)
    read: Callable[..., Patient] = partial(
        admit, base=model, adapter=adapter_name, allow_pickle=allow_pickle
    )
    patient = read(adapter, **where)
    if not (fix or un_nest or drop_nested):
        return _diagnosed(patient)
    treatment = Treatment(_copy(patient.values), _copy(patient.tensors))
    refusals = []
    try:
        if un_nest or drop_nested:
            within = [Path(folder).expanduser() for folder in nested]
            made_plain(patient, treatment, within, drop_nested)
    except UnsupportedError as error:
        refusals = [Finding("nested adapters", patient.where, *_parted(str(error)))]
        treatment = Treatment(_copy(patient.values), _copy(patient.tensors))
    if fix:
        fixed(replace(patient, values=treatment.values, tensors=treatment.tensors), treatment)
    if patient.others and (fix or treatment.done):
        others = ", ".join(f"`{name}`" for name in patient.others)
        treatment.done.append(f"left out the tensors of {others}")
    if not treatment.done:
        return _diagnosed(patient, refusals)
    folder = _write(patient, treatment, output)
    return _diagnosed(read(folder), refusals, treatment.done)


def _diagnosed(
    patient: Patient, refusals: Sequence[Finding] = (), done: Sequence[str] = ()
) -> Diagnosis:
    found = [*refusals, *patient.failures]
    told = {each.law for each in refusals}
    for _, check in CHECKS.items():
        found += (each for each in check(patient) if each.law not in told)
    return Diagnosis(
        source=patient.source,
        findings=tuple(each for each in found if not each.is_note),
        notes=tuple(each for each in found if each.is_note),
        done=tuple(done),
    )


def _skeleton(base: str | os.PathLike[str] | nn.Module | None) -> nn.Module | None:
    if base is None or isinstance(base, nn.Module):
        return base
    from multigraft.train import load_skeleton

    return load_skeleton(base)


def _write(patient: Patient, treatment: Treatment, output: str | os.PathLike[str] | None) -> Path:
    """Put the new files in place, and the old ones beside them."""
    folder = patient.folder if output is None else Path(output).expanduser()
    paths = [p for p in (patient.config_path, patient.weights_path) if p is not None]
    if output is None and any(path.is_symlink() for path in paths):
        raise CheckpointError(
            f"{folder} holds links, as a cache does, and files behind links are not changed. Name "
            "a directory for the new ones: --output DIR."
        )
    weights = WEIGHTS_NAME
    if output is None and patient.weights_path and patient.weights_path.suffix == ".safetensors":
        weights = patient.weights_path.name
    files: dict[Path, Callable[[Path], None]] = {}
    old: list[Path] = []
    if treatment.values is not None:
        text = json.dumps(treatment.values, indent=2, sort_keys=True)
        files[folder / CONFIG_NAME] = partial(write_utf8, text=text)
        old += [patient.config_path] if patient.config_path else []
    if treatment.tensors is not None:
        files[folder / weights] = partial(write_tensors, treatment.tensors)
        old += [patient.weights_path] if patient.weights_path else []
    kept = []
    for path in old if output is None else ():
        if path in files:
            kept.append(_backup(path))
            files[kept[-1]] = partial(_copy_file, path)
    write_files(files)
    where = f"written to {folder}"
    treatment.done.append(
        f"{where}; the old files are {', '.join(path.name for path in kept)}" if kept else where
    )
    return folder if weights == WEIGHTS_NAME else folder / weights


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _backup(path: Path) -> Path:
    """A name beside ``path`` that nothing has."""
    names = (f"{path.name}{BACKUP}{number or ''}" for number in range(10_000))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def _copy(values: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if values is None else dict(values)


def _parted(message: str) -> tuple[str, str]:
    problem, _, remedy = message.rpartition(". ")
    return (f"{problem}.", remedy) if problem else (message, "Load each adapter by itself.")
