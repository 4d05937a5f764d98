"""A model with adapters from disk, put together to be looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from multigraft.config import CONFIG_NAME
from multigraft.containers import check_name
from multigraft.errors import AdapterNameError, CheckpointError
from multigraft.inspection.files import AdapterFiles, read_adapters
from multigraft.model import PeftModel


def assemble(
    places: Sequence[str | os.PathLike[str]],
    load: Callable[[str], nn.Module],
    *,
    base: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    prepare: Callable[[nn.Module, Mapping[str, AdapterFiles]], None] | None = None,
) -> nn.Module:
    """A base model with the adapters in these places side by side.

    Args:
        places: directories of adapters, or ids on the hub; one may be the base model itself.
        load: makes the base model of its directory or id.
        base: the base model; by default the one in ``places``, or the one that the adapters name.
        prepare: is given the base and the adapters by name before any is attached.

    Raises:
        CheckpointError: no base is given or named, or an adapter does not fit it.
    """
    bases = [place for place in places if _is_base(place)]
    adapters = [os.fspath(place) for place in places if place not in bases]
    if base is not None:
        bases.append(base)
    if len(bases) > 1:
        raise CheckpointError(f"{bases[0]} and {bases[1]} are both base models. Give one of them.")
    found = read_adapters(adapters, allow_pickle=allow_pickle) if adapters else []
    model = load(os.fspath(bases[0]) if bases else _base_of(found))
    named = {_usable(files.name, number): files for number, files in enumerate(found, start=1)}
    if prepare is not None:
        prepare(model, named)
    handle: PeftModel | None = None
    for name, files in named.items():
        if handle is None:
            handle = PeftModel.from_pretrained(
                model, files.folder, adapter_name=name, allow_pickle=allow_pickle
            )
        else:
            handle.load_adapter(files.folder, name, allow_pickle=allow_pickle)
    return model if handle is None else handle


def _is_base(place: str | os.PathLike[str]) -> bool:
    folder = Path(place).expanduser()
    return (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file()


def _base_of(found: Sequence[AdapterFiles]) -> str:
    """The base that the adapters name, which must be one."""
    named = {files.config.base_model_name_or_path or "" for files in found}
    if len(named) == 1 and named != {""}:
        return named.pop()
    what = f"name several ({', '.join(sorted(named))})" if len(named) > 1 else "name none"
    raise CheckpointError(f"no base model is given, and the adapters {what}. Give it with --base.")


def _usable(name: str, number: int) -> str:
    """The name that an adapter gets in the model: its folder's, where that can be one."""
    try:
        check_name(name)
    except AdapterNameError:
        return f"adapter-{number}"
    return name
