"""Everything that a report shows, as data: adapters, their sites' figures, how they compare."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from torch import nn

from multigraft.errors import MultigraftError
from multigraft.inspection.change import Change, Left, changes_in_files, changes_on
from multigraft.inspection.files import AdapterFiles, read_adapters
from multigraft.report.curves import Curve, read_curves
from multigraft.report.figures import SiteFigures, figures_of
from multigraft.report.intruders import LARGEST, count_intruders
from multigraft.report.similarity import Similarity, similarity


@dataclass(frozen=True)
class AdapterFigures:
    """One adapter.

    Args:
        method: its ``peft_type``.
        base: the model that its config names.
        parameters, bytes: of its weights' file.
        sites: by path, in the file's order.
        left: what has no figures, and why.
    """

    name: str
    method: str
    base: str
    parameters: int
    bytes: int
    sites: Mapping[str, SiteFigures]
    left: Mapping[str, str]
    curves: tuple[Curve, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of all its changes together."""
        return math.sqrt(sum(site.norm**2 for site in self.sites.values()))

    @property
    def relative(self) -> float | None:
        """The norm beside that of all the weights that it changes; None without a base."""
        bases = [site.base_norm for site in self.sites.values()]
        total = math.sqrt(sum(norm**2 for norm in bases if norm is not None))
        return self.norm / total if total and None not in bases else None


@dataclass(frozen=True)
class Report:
    """Adapters, and how they compare.

    Args:
        base: what norms are relative to; None where they are absolute.
        intruder_limit: up to which size weights were searched for intruders.
    """

    adapters: tuple[AdapterFigures, ...]
    similarities: tuple[Similarity, ...]
    base: str | None
    intruder_limit: int


def collect(
    adapters: Sequence[str | os.PathLike[str]],
    *,
    base: nn.Module | None = None,
    intruder_limit: int = LARGEST,
    allow_pickle: bool = False,
) -> Report:
    """The figures of adapters on disk.

    Args:
        adapters: directories, or ids on the hub; a directory of several means all of them.
        base: the model that they belong to; it is given back as it was.
        intruder_limit: the smaller side of a weight up to which it is searched for intruder
            dimensions, at a cost that grows with its cube; 0 searches none.

    Raises:
        CheckpointError, ConfigError, TargetError: an adapter is damaged, or does not fit the base.
    """
    files = read_adapters([os.fspath(each) for each in adapters], allow_pickle=allow_pickle)
    found = tuple(_adapter(each, base, intruder_limit) for each in files)
    pairs = combinations(found, 2)
    return Report(
        adapters=found,
        similarities=tuple(similarity(a.name, a.sites, b.name, b.sites) for a, b in pairs),
        base=None if base is None else _name_of(base),
        intruder_limit=intruder_limit,
    )


def _adapter(files: AdapterFiles, base: nn.Module | None, limit: int) -> AdapterFigures:
    left = Left()
    sites = {}
    for change in _changes(files, base, left):
        figures = figures_of(change)
        if change.weight is not None and limit:
            found = count_intruders(change.weight, change.matrices(), largest=limit)
            figures = replace(figures, intruders=found)
        sites[change.path] = figures
    counts = _parameters(files, sites)
    return AdapterFigures(
        name=files.name,
        method=str(files.values.get("peft_type")),
        base=_short(str(files.values.get("base_model_name_or_path") or "")),
        parameters=files.parameters,
        bytes=files.bytes,
        sites={path: replace(site, parameters=counts[path]) for path, site in sites.items()},
        left=left.reasons,
        curves=tuple(read_curves(files.folder, files.name)),
    )


def _changes(files: AdapterFiles, base: nn.Module | None, left: Left) -> Iterator[Change]:
    if base is not None:
        yield from changes_on(base, files, left)
        return
    try:
        yield from changes_in_files(files, left)
    except MultigraftError as error:  # a method of another library, say: its size is still shown
        left.reasons["the whole adapter"] = str(error)


def _parameters(files: AdapterFiles, sites: Mapping[str, SiteFigures]) -> dict[str, int]:
    """How many numbers of the file belong to each site: to the longest path that holds the key."""
    counts = dict.fromkeys(sites, 0)
    for key, tensor in files.tensors.items():
        parts = key.replace(".base_layer", "").split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        owner = next((path for path in paths if path in counts), None)
        if owner is not None:
            counts[owner] += tensor.numel()
    return counts


def _name_of(base: nn.Module) -> str:
    return _short(str(getattr(base, "name_or_path", "") or type(base).__name__))


def _short(name: str) -> str:
    """An id on the hub, or a directory's name: a page that is passed on shows nobody's folders."""
    path = Path(name)
    is_folder = path.is_absolute() or name.count("/") > 1 or name.startswith((".", "~"))
    return (path.name or name) if is_folder else name
