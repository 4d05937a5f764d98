"""What an adapter's folder says of the base that it goes on: the classes that a head tells apart.

``task.json`` lies beside the adapter's own files; whatever does not know it passes over it.

    {"task": {"name": "seq-cls", "labels": ["no", "yes"], "problem": "single"},
     "base": {"id2label": {"0": "no", "1": "yes"}, "pad_token_id": 0, …}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multigraft.errors import CheckpointError

NOTES_NAME = "task.json"
NOTES_BYTES = 8 << 20
SETTINGS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Fields of a base's config that depend on the task, not on the checkpoint."""


def read_notes(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What ``task.json`` holds; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(folder) / NOTES_NAME
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > NOTES_BYTES:
            raise ValueError(f"more than {NOTES_BYTES >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(found[key], dict) for key in ("task", "base")):
            raise ValueError("`task` and `base` must be objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Copy the adapter's folder anew, or remove this file "
            "and name the labels yourself."
        ) from error
    return dict(found)


def settings_in(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``from_pretrained`` of the base needs to be told for this adapter.

    Raises:
        CheckpointError: ``task.json`` is damaged.
    """
    found = read_notes(folder).get("base", {})
    settings = {key: found[key] for key in SETTINGS if found.get(key) is not None}
    if "id2label" in settings:
        names = settings["id2label"]
        settings["id2label"] = {int(number): name for number, name in names.items()}
        settings["num_labels"] = len(names)
        # A head of another size is what the adapter's own one replaces.
        settings["ignore_mismatched_sizes"] = True
    return settings


def settings_of(base: Any) -> dict[str, Any]:
    """The same fields of a base that is loaded."""
    config = getattr(base, "config", None)
    return {key: getattr(config, key, None) for key in SETTINGS}
