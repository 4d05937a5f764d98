"""An adapter's files as the checks see them: read with suspicion, the base never loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.checkpoint import locate, locate_weights
from multigraft.config import PeftConfig
from multigraft.diagnosis.findings import Finding
from multigraft.diagnosis.names import Parsed, Tool, nested, parsed, standards, tools_of
from multigraft.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    MultigraftError,
    there_are,
)
from multigraft.inspection.files import folders_in
from multigraft.reading import (
    CONFIG_NAME,
    PICKLE_ENDINGS,
    WEIGHTS_NAME,
    check_inside,
    read_config,
    read_tensors,
)


@dataclass(eq=False)
class Patient:
    """An adapter's config and tensors, as they stand in its files.

    Args:
        source: what the user named.
        config_path, weights_path: the files, where there are such.
        values: the config's, as they stand there; None when it cannot be read.
        tensors: by their names in the file, mapped and not read; None when it cannot be read.
        base: the base model without weights, when the user named one.
        failures: what could not be read, and why.
        others: adapters whose tensors stand in the file as well and were left out.
    """

    source: str
    config_path: Path | None = None
    weights_path: Path | None = None
    values: dict[str, Any] | None = None
    tensors: dict[str, Tensor] | None = None
    base: nn.Module | None = None
    failures: list[Finding] = field(default_factory=list)
    others: tuple[str, ...] = ()

    @cached_property
    def config(self) -> PeftConfig | ConfigError:
        """The config, or why its values make none."""
        if self.values is None:
            return ConfigError("there is none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return PeftConfig.from_dict(self.values)
            except MultigraftError as error:
                return ConfigError(str(error))

    @property
    def is_by_design(self) -> bool:
        """Whether wrappers in base layers are one adapter's own; see `nest.nested`."""
        return bool((self.values or {}).get("target_parameters"))

    @cached_property
    def is_foreign(self) -> bool:
        """Whether another tool named the tensors."""
        return bool(self.tools)

    @cached_property
    def tools(self) -> dict[str, Tool]:
        """Names that other tools gave, and which."""
        return tools_of(self.tensors or ())

    @cached_property
    def is_plain(self) -> bool:
        """Whether the tensors are one adapter's, under names that tell what they are."""
        owners = {found.adapter for found in self.names.values() if found.adapter}
        is_nest = any(nested(name, self.is_by_design) for name in self.names)
        return not (self.is_foreign or is_nest or len(owners) > 1)

    @cached_property
    def names(self) -> dict[str, Parsed]:
        """Every tensor's name, taken apart."""
        return {name: parsed(name) for name in self.tensors or ()}

    @cached_property
    def standard(self) -> dict[str, Tensor]:
        """The tensors by the names that PEFT's files have; of equal ones, the first."""
        found: dict[str, Tensor] = {}
        for name, new in standards(self.tensors or ()).items():
            found.setdefault(new, (self.tensors or {})[name])
        return found

    @cached_property
    def sites(self) -> dict[str, dict[str, Tensor]]:
        """By base path: the adapter's own tensors, by what stands behind the path."""
        sites: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.standard.items() if self.is_plain else ():
            found = parsed(name)
            is_own = found.group not in ("", "modules_to_save")
            if is_own and not found.site.startswith("base_"):
                leaf = ".".join(found.rest).removesuffix("weight")
                key = f"{found.group}.{leaf}".rstrip(".")
                sites.setdefault(found.site, {})[key] = tensor
        return sites

    @property
    def where(self) -> str:
        """The name of the config's file, for findings."""
        return self.config_path.name if self.config_path else CONFIG_NAME

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        path = self.config_path or self.weights_path
        return path.parent if path else Path(self.source)


def admit(
    source: str | os.PathLike[str],
    base: nn.Module | None,
    *,
    adapter: str | None = None,
    allow_pickle: bool = False,
    **where: Any,
) -> Patient:
    """Read an adapter's files: a directory's, those around a single file, or from the hub.

    Args:
        base: the base model without weights.
        adapter: whose tensors count, in a file that holds those of several.

    Raises:
        CheckpointError: there is nothing there that could be an adapter.
        AdapterNameError: the file names adapters, and this is none of them.
    """
    patient = Patient(os.fspath(source), base=base)
    path = Path(source).expanduser()
    if path.is_file():
        patient.weights_path = path
        _find_beside(patient, path.parent / CONFIG_NAME)
    elif path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a directory nor a regular file. Name an adapter.")
    else:
        _find(patient, path, where)
    _read(patient, allow_pickle)
    if adapter is not None and patient.tensors is not None:
        _keep(patient, adapter)
    return patient


def _keep(patient: Patient, adapter: str) -> None:
    """Leave out the tensors of other adapters."""
    assert patient.tensors is not None
    own = {name: parsed(name).adapter for name in patient.tensors}
    names = set(own.values()) - {""}
    if names and adapter not in names:
        raise AdapterNameError(
            f"{patient.source} holds no tensors of `{adapter}`.{there_are(names)} Name one of them."
        )
    patient.others = tuple(sorted(names - {adapter}))
    patient.tensors = {n: t for n, t in patient.tensors.items() if own[n] in ("", adapter)}


def _find_beside(patient: Patient, config: Path) -> None:
    """The config in the folder of a file that was named by itself."""
    if not config.is_file():
        problem = f"{config.parent} holds no {config.name}, and the tensors cannot do without."
        patient.failures.append(_missing(CONFIG_NAME, problem))
        return
    try:
        check_inside(config, config.parent)
        patient.config_path = config
    except CheckpointError as error:
        patient.failures.append(_unreadable(config, error))


def _find(patient: Patient, path: Path, where: Mapping[str, Any]) -> None:
    inside = folders_in(path) if path.is_dir() and not where.get("subfolder") else []
    path = inside[0] if len(inside) == 1 else path
    missing = []
    for name, find in (("config_path", locate), ("weights_path", locate_weights)):
        arguments = (CONFIG_NAME,) if find is locate else ()
        try:
            setattr(patient, name, find(path, *arguments, **where))
        except CheckpointError as error:
            missing.append((CONFIG_NAME if find is locate else WEIGHTS_NAME, error))
    there = [name for name, _ in missing if os.path.lexists(path / name)]
    if len(missing) == 2 and not there:
        raise missing[0][1]
    for name, reason in missing:
        finding = _unreadable(path / name, reason) if name in there else _missing(name, str(reason))
        patient.failures.append(finding)


def _missing(name: str, problem: str) -> Finding:
    remedy = "Copy the file into the folder, or save the adapter again."
    return Finding("missing file", name, problem, remedy)


def _read(patient: Patient, allow_pickle: bool) -> None:
    if patient.config_path is not None:
        try:
            patient.values = read_config(patient.config_path)
        except (ConfigError, CheckpointError) as error:
            patient.failures.append(_unreadable(patient.config_path, error))
    path = patient.weights_path
    if path is None:
        return
    try:
        patient.tensors = read_tensors(path, allow_pickle=allow_pickle)
    except CheckpointError as error:
        patient.failures.append(_unreadable(path, error))


def _unreadable(path: Path, error: Exception) -> Finding:
    if path.suffix in PICKLE_ENDINGS and "can run code" in str(error):
        return Finding(
            "pickle",
            path.name,
            "is a pickle, which can run code when it is read; it was not read.",
            "If you trust where it comes from, run the doctor with --allow-pickle --fix, which "
            f"writes {WEIGHTS_NAME} beside it.",
        )
    text = str(error).removeprefix(str(path)).lstrip(": ")
    problem, _, remedy = text.rpartition(". ")
    if not problem:
        problem, remedy = text, "Copy or download it again."
    return Finding("unreadable file", path.name, f"{problem.rstrip('.')}.", remedy)


def as_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes and dtypes without values."""
    return {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
