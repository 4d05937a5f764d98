"""The disk format: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them.

What an adapter owns is asked of its grafts; no key is ever recognised by a substring. Saving is
atomic. Loading compares every name and shape with what the config means on this model before
anything is changed, and fails with a report unless told otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from multigraft import hub
from multigraft.atomic import recover, write_files, write_utf8
from multigraft.card import CARD_NAME, new_card
from multigraft.config import PeftConfig
from multigraft.errors import CheckpointError, SourceError
from multigraft.fields import check_regex
from multigraft.finite import is_finite
from multigraft.graft import Graft
from multigraft.keys import full_key, memory_name, saved_tensors, strip_prefix
from multigraft.methods.contract import Params
from multigraft.reading import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    check_inside,
    read_tensors,
)
from multigraft.roster import Roster
from multigraft.whole import is_parted, whole
from multigraft.writing import write_tensors


@dataclass
class LoadReport:
    """What a file and a model disagree about; empty when they agree.

    Args:
        missing_keys: tensors that the adapter has and the file lacks.
        unexpected_keys: tensors that the file has and the adapter lacks.
        mismatched_keys: (key, shape in the file, shape in the model).
        nonfinite_keys: tensors of the file that hold NaN or infinity.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=list
    )
    nonfinite_keys: list[str] = field(default_factory=list)

    def check(self, where: str, strict: bool = True, ignore_mismatched_sizes: bool = False) -> None:
        """Raise `CheckpointError` with the whole report unless all is in order or allowed."""
        problems = []
        if strict:
            problems += _listing("missing from the file", self.missing_keys)
            problems += _listing("not part of this adapter on this model", self.unexpected_keys)
            problems += _listing("NaN or infinity in", self.nonfinite_keys)
        if not ignore_mismatched_sizes:
            shapes = [f"{k} {a} instead of {b}" for k, a, b in self.mismatched_keys]
            problems += _listing("of another shape than the model needs", shapes)
        if problems:
            raise CheckpointError(
                f"{where} does not fit: {'; '.join(problems)}. Is it meant for this base model and "
                "this config? Nothing was changed. Pass strict=False (ignore_mismatched_sizes=True "
                "for shapes) to load what fits."
            )


def compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    optional: Collection[str] = (),
) -> tuple[LoadReport, dict[str, Tensor]]:
    """The report, and the tensors that fit; keys are relative to the base model.

    Args:
        optional: keys of ``expected`` that a file may lack.
    """
    missing = [key for key in expected if key not in found and key not in optional]
    report = LoadReport(missing_keys=[full_key(key) for key in missing])
    good = {}
    for key, tensor in found.items():
        if key not in expected:
            report.unexpected_keys.append(full_key(key))
        elif tuple(tensor.shape) != tuple(expected[key]):
            shapes = tuple(tensor.shape), tuple(expected[key])
            report.mismatched_keys.append((full_key(key), *shapes))
        else:
            good[key] = tensor
            if not is_finite(tensor):
                report.nonfinite_keys.append(full_key(key))
    return report, good


def adapter_state(
    roster: Roster,
    adapter: str,
    gathered: Mapping[str, Tensor] | None = None,
    *,
    packed: bool = True,
    joined: bool = False,
) -> dict[str, Tensor]:
    """An adapter's own tensors by key on disk, relative to the base model.

    Args:
        gathered: a state dict of the base model to take the values from (sharded training).
        packed: as the file has them, where that is less than what is in memory.
        joined: whole ones of tensors that lie in parts on several processes, all of which ask.
    """
    state = {}
    for layer in roster.layers[adapter]:
        for key, graft, name in saved_tensors(layer, adapter):
            value = params_in(graft, gathered)[name]
            value = whole(value) if joined else value
            state[key] = graft.method.packed(name, value) if packed else value
    context = roster.context_of(adapter)
    if context is not None:
        state |= {k: whole(v) if joined else v for k, v in context.saved().items()}
    return state


def params_in(graft: Graft, gathered: Mapping[str, Tensor] | None) -> Params:
    """A graft's tensors by name, with the values that a gathered state dict has for them."""
    if gathered is None:
        return graft.params
    if graft.tied is not None and graft.stand_in is None:
        return graft.method.from_tied(params_in(graft.tied, gathered))
    names = {name: memory_name(graft, name) for name in graft.owners}
    taken = {n: gathered[key] for n, key in names.items() if key in gathered}
    return {**graft.params, **taken}


def save(root: Path, adapters: dict[Path, tuple[PeftConfig, dict[str, Tensor]]]) -> None:
    """Write each adapter's two files into its directory, and a model card: all of them or none.

    Args:
        root: where the card goes, unless the user has one there.
        adapters: directories to config and tensors by key relative to the base model.

    Raises:
        CheckpointError: a tensor has no values, or the disk refuses; old files stay as they were.
    """
    files: dict[Path, Callable[[Path], None]] = {}
    for directory, (config, state) in adapters.items():
        for key, tensor in state.items():
            _require_values(key, tensor)
        named = {full_key(key): tensor for key, tensor in state.items()}
        files[directory / WEIGHTS_NAME] = partial(write_tensors, named)
        files[directory / CONFIG_NAME] = partial(write_utf8, text=config.to_json())
    if not os.path.lexists(root / CARD_NAME):
        config, _ = next(reversed(adapters.values()))
        files[root / CARD_NAME] = partial(write_utf8, text=new_card(config))
    write_files(files)


def read(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of a checkpoint file, on the CPU, by key relative to the base model.

    Raises:
        CheckpointError: the file is damaged, or is a pickle and ``allow_pickle`` is not set.
    """
    tensors = read_tensors(path, allow_pickle=allow_pickle)
    return _keyed(((strip_prefix(key), tensor) for key, tensor in tensors.items()), str(path))


def _keyed(items: Iterable[tuple[str, Tensor]], where: str) -> dict[str, Tensor]:
    """A dictionary, unless two tensors have the same name: which one counts would be chance."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in items:
        if key in tensors:
            raise CheckpointError(
                f"{where}: two tensors mean `{key}`, once prefixes and wrappers are taken off or "
                "names are mapped. Rename or remove one of them."
            )
        tensors[key] = tensor
    return tensors


def rename(tensors: Mapping[str, Tensor], mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Keys with the first regular expression of ``mapping`` that matches replaced."""
    for pattern in mapping or {}:
        check_regex("key_mapping", pattern)
    renamed = []
    for key, tensor in tensors.items():
        for pattern, replacement in (mapping or {}).items():
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        renamed.append((key, tensor))
    return _keyed(renamed, "`key_mapping`")


def locate(
    source: str | os.PathLike[str], filename: str, *, subfolder: str | None = "", **options: Any
) -> Path:
    """The local path of an adapter's file, fetched from the hub when ``source`` is no directory.

    Args:
        options: `revision`, `token` and others of `multigraft.hub.OPTIONS`.

    Raises:
        SourceError: there is no such file.
    """
    folder = Path(source).expanduser()
    inside = folder / (subfolder or "")
    recover(inside)
    if (inside / filename).is_file():
        check_inside(inside / filename, folder)
        return inside / filename
    if folder.is_dir() or folder.is_absolute() or str(source).startswith("."):
        refusal = SourceError(f"{inside} holds no {filename}.{_nearby(folder, filename)}")
        refusal.lacks_file = folder.is_dir()
        raise refusal
    return hub.fetch(str(source), filename, subfolder or "", **options)


def locate_weights(source: str | os.PathLike[str], **where: Any) -> Path:
    """The path of an adapter's weights; safetensors before pickles."""
    try:
        return locate(source, WEIGHTS_NAME, **where)
    except SourceError as error:
        if error.is_cut_off or not error.lacks_file:
            raise
        try:
            return locate(source, PICKLE_NAME, **where)
        except SourceError:
            raise error from None


def _require_values(key: str, tensor: Tensor) -> None:
    # A site of rank 0 has another shape.
    if tensor.is_meta or is_parted(tensor) or tuple(tensor.shape) == (0,):
        raise CheckpointError(
            f"`{key}` holds no values (shape {tuple(tensor.shape)} on {tensor.device}): sharded or "
            "meta tensors must be gathered before saving; pass the full state_dict=."
        )


def _listing(what: str, names: list[str], limit: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what}: {', '.join(names[:limit])}{more}"]


def _nearby(folder: Path, filename: str) -> str:
    if not folder.is_dir():
        return " There is no such directory."
    names = sorted(p.parent.name for p in folder.glob(f"*/{filename}"))
    return f" Adapters in its subfolders: {', '.join(names)} (pass subfolder=)." if names else ""
