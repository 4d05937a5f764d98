"""Adapters under a directory, or in the hub's cache, by what their configs and headers say.

No tensor is read: a thousand adapters are listed in the time that their small files take.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from multigraft.config import CONFIG_NAME, PeftConfig
from multigraft.errors import CheckpointError, MultigraftError
from multigraft.reading import PICKLE_NAME, WEIGHTS_NAME, read_config, read_header

SKIPPED = ("__pycache__", "node_modules", "blobs")
SNAPSHOTS = "snapshots"
MODELS = "models--"


@dataclass(frozen=True)
class Listed:
    """One adapter.

    Args:
        name: its path below what was looked through; in the hub's cache its id there.
        path: of its folder.
        method: its ``peft_type``.
        rank: its smallest and largest rank, where its method has one.
        base: the base model that it names.
        task: its ``task_type``.
        parameters: how many numbers its file holds; None for pickles, which are not opened.
        bytes: of that file.
        saved: when that was written.
        problem: what is wrong with its files; empty where nothing is.
    """

    name: str
    path: str
    method: str = ""
    rank: tuple[int, int] | None = None
    base: str = ""
    task: str = ""
    parameters: int | None = None
    bytes: int = 0
    saved: datetime | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = asdict(self)
        found["saved"] = None if self.saved is None else self.saved.isoformat(timespec="seconds")
        return found


def hub_cache() -> Path:
    """Where the hub's files are kept on this machine."""
    own = os.environ.get("HF_HUB_CACHE")
    if own:
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(home).expanduser() / "hub"


def list_adapters(folder: str | os.PathLike[str]) -> list[Listed]:
    """Every adapter under a directory, by name; damaged ones too, with what is wrong.

    Hidden directories are passed over, and links to directories are not followed.

    Raises:
        CheckpointError: there is no such directory.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise CheckpointError(f"{root}: there is no such directory to look for adapters in.")
    found = [_listed(root, place) for place in _places(root)]
    return sorted(found, key=lambda each: each.name)


def _places(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in SKIPPED]
        if CONFIG_NAME in files:
            yield Path(place)


def _listed(root: Path, place: Path) -> Listed:
    name = _name(root, place)
    values: dict[str, Any] = {}
    try:
        values = read_config(place / CONFIG_NAME)
        described = _described(values)
        return Listed(name, str(place), **described, **_weights(place))
    except MultigraftError as error:
        method = values.get("peft_type")
        kind = method if isinstance(method, str) else ""
        return Listed(name, str(place), method=kind, problem=str(error))


def _described(values: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: Any = PeftConfig.from_dict(values)
    return {
        "method": str(config.peft_type),
        "rank": _rank(config),
        "base": str(config.base_model_name_or_path or ""),
        "task": str(config.task_type or ""),
    }


def _rank(config: Any) -> tuple[int, int] | None:
    rank = getattr(config, "r", None)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return None
    patterns = getattr(config, "rank_pattern", None) or {}
    ranks = [rank, *(value for value in patterns.values() if isinstance(value, int))]
    return min(ranks), max(ranks)


def _weights(place: Path) -> dict[str, Any]:
    path = place / WEIGHTS_NAME
    if path.is_file():
        count = 0
        for info in read_header(path).tensors.values():
            count += (info.end - info.start) // info.dtype.itemsize
        return {"parameters": count, **_file(path)}
    if (place / PICKLE_NAME).is_file():
        return _file(place / PICKLE_NAME)
    raise CheckpointError(
        f"{place} has a config and no weights ({WEIGHTS_NAME}). Copy or download it again."
    )


def _file(path: Path) -> dict[str, Any]:
    facts = path.stat()
    saved = datetime.fromtimestamp(facts.st_mtime, tz=timezone.utc)
    return {"bytes": facts.st_size, "saved": saved}


def _name(root: Path, place: Path) -> str:
    """The path below the root; the id of what the hub's cache holds."""
    parts = place.relative_to(root).parts
    if len(parts) > 2 and parts[0].startswith(MODELS) and parts[1] == SNAPSHOTS:
        known = parts[0].removeprefix(MODELS).replace("--", "/")
        return "/".join([f"{known}@{parts[2][:8]}", *parts[3:]])
    return "/".join(parts) or root.resolve().name
