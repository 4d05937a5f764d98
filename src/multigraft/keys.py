"""Names of an adapter's tensors: on disk, in memory, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from multigraft.config import PeftConfig
from multigraft.containers import escape
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.site import Site

PREFIX = "base_model.model."
"""What stands before every base path in a file."""

INFIXES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Path components that wrappers of torch add."""


def strip_prefix(key: str) -> str:
    """A file's key relative to the base model; wrappers that torch puts around it are dropped."""
    parts = key.removeprefix(PREFIX).split(".")
    return ".".join(part for part in parts if part not in INFIXES)


def full_key(key: str) -> str:
    """A key as the file has it: below the base model, or of the adapter as a whole.

    What lies below the base model has a path, so a name without one is of the adapter as a whole.
    """
    return key if key.startswith("base_model.") or "." not in key else PREFIX + key


def disk_names(site: Site, name: str, config: PeftConfig | None = None) -> str:
    """Key of a tensor relative to the base model; one of the whole adapter is absolute.

    Args:
        config: the adapter's. What prompt learning saves of the base lies in PEFT's files one
            level higher, since there no tuner stands between the handle and the base.
    """
    if name.startswith("base_model."):
        return name
    key = f"{site.disk}.{name}"
    return key if config is None else placed(key, config)


def placed(key: str, config: PeftConfig) -> str:
    """Where a key of the base lies in an adapter's file; see `disk_names` on prompt learning."""
    return strip_prefix(f"base_model.{key}") if config.is_prompt_learning else key


def saved_tensors(layer: AdaptedLayer, adapter: str) -> Iterator[tuple[str, Graft, str]]:
    """(key on disk, graft, name in memory) of what one adapter saves at one layer."""
    for graft in layer.grafts[adapter]:
        for name, spec in graft.specs().items():
            if spec.saved:
                config = graft.method.config
                yield disk_names(graft.site, spec.on_disk or name, config), graft, name


def memory_name(graft: Graft, name: str) -> str:
    """Name of a tensor in the adapted model's state dict, relative to the base model."""
    if graft.tied is not None and not graft.owns(name):
        graft = graft.tied
    host, label = graft.site.host_path, graft.site.label and f".{graft.site.label}"
    if graft.stand_in is not None:
        return f"{host}.{graft.method.prefix}.{escape(graft.adapter)}{label}.{name}"
    if graft.shared is not None and name in graft.shared.specs:
        name, label = f"{graft.method.prefix}shared.{name}", ""
    group, _, leaf = name.partition(".")
    tail = f".{leaf}" if leaf else ""
    return f"{host}.{group}.{escape(graft.adapter)}{label}{tail}"


def sites_in(state: Iterable[str], prefix: str, known: Collection[str]) -> list[str]:
    """Base paths of the sites that these keys belong to.

    Args:
        prefix: how the names of the method's tensors begin.
        known: every base path of the model; what follows a site's path is none of them.
    """
    paths: dict[str, None] = {}
    for key in state:
        parts = strip_prefix(key).split(".")
        for index in range(1, len(parts)):
            path, group = ".".join(parts[:index]), parts[index]
            if group.startswith(prefix) and path in known and f"{path}.{group}" not in known:
                paths[path] = None
    return list(paths)
