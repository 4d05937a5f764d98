"""How tensors in files correspond to a model's: one to one, or several that make one.

transformers keeps the experts of a layer in one parameter, and most files keep them one by one. Its
own table of such conversions says which; here it is asked for a single parameter at a time, so that
never more of them are in memory than one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import UnsupportedError
from multigraft.merging.mapped import MappedWeights

REMEDY = (
    "Load the model, save it with save_pretrained(save_original_format=False), and merge into "
    "that; or merge in memory with merge_and_unload()."
)


@dataclass(eq=False)
class Built:
    """Tensors of a model that are made of others in the files.

    Args:
        keys: those in the files.
        shapes: by path in the model.
        make: from values by key to values by path.
        undo: the way back.
    """

    keys: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    undo: Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(eq=False)
class Layout:
    """The correspondence.

    Args:
        names: paths in the model to keys in the files, where both are one tensor.
        built: other paths to what they are made of.
    """

    names: dict[str, str] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)


def layout_of(model: nn.Module, tensors: Mapping[str, Tensor], weights: MappedWeights) -> Layout:
    """How these files hold this model.

    Args:
        tensors: the model's, by path.

    Raises:
        UnsupportedError: what is made of several tensors cannot be taken apart again.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import dot_natural_key, rename_source_key
    except ImportError:  # before 5, where models are as their files are
        return Layout(_by_prefix(set(tensors), weights, prefix))
    found = Layout()
    parts: dict[str, list[tuple[str, str]]] = {}
    renamings, converters = _of_kinds(get_model_conversion_mapping(model))
    for key in sorted(weights, key=dot_natural_key):
        path, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if path not in tensors and key in tensors:
            path, pattern = key, None
        if path in tensors and pattern is None:
            found.names[path] = key
        elif path in tensors:
            parts.setdefault(path, []).append((key, pattern))
    undo = _undoing(model) if parts else None
    for path, sources in parts.items():
        made = _built(model, converters, path, sources, weights, undo)
        found.built |= dict.fromkeys(made.shapes, made)
    return found


def _by_prefix(names: set[str], weights: MappedWeights, prefix: str) -> dict[str, str]:
    """Names as they stand; a bare model's lack the prefix that they have beneath a head."""
    found = {}
    for key in weights:
        for name in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
            if name in names:
                found[name] = key
                break
    return found


def _of_kinds(transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Those that rename, and those that change values."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    return (
        [each for each in transforms if isinstance(each, WeightRenaming)],
        [each for each in transforms if isinstance(each, WeightConverter)],
    )


def _undoing(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What takes values by path apart into values by key, whatever is grafted onto the model later.

    The table is made now: it goes by the modules' own paths.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion

    table = get_model_conversion_mapping(model, add_legacy=False)
    table = [each for each in table if not isinstance(each, PrefixChange)]

    class Holder:
        """All that is asked of the model."""

        config = model.config
        _weight_conversions = table

    def undo(values: dict[str, Tensor]) -> dict[str, Tensor]:
        holder: Any = Holder()
        return dict(revert_weight_conversion(holder, dict(values)))

    return undo


def _built(
    model: nn.Module,
    converters: Sequence[Any],
    path: str,
    sources: Sequence[tuple[str, str]],
    weights: MappedWeights,
    undo: Any,
) -> Built:
    """One conversion, tried on tensors without values: there and back again."""
    pattern_of = {pattern: each for each in converters for pattern in each.source_patterns}
    keys = tuple(key for key, _ in sources)
    config: Any = model.config

    def make(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(pattern_of[sources[0][1]])
        for key, pattern in sources:
            converter.add_tensor(path, key, pattern, values[key])
        out = converter.convert(path, model=model, config=config)
        return {name: v[0] if isinstance(v, list) else v for name, v in out.items()}

    empty = {}
    for key in keys:
        info = weights.info(key)
        empty[key] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    try:
        made = make(empty)
        back = undo(made)
    except Exception as error:  # whatever an operation of the table trips over
        raise UnsupportedError(
            f"{weights.folder}: `{path}` cannot be made of its {len(keys)} tensors by themselves "
            f"({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    shapes = {key: tuple(value.shape) for key, value in back.items()}
    if shapes != {key: weights.info(key).shape for key in keys}:
        raise UnsupportedError(
            f"{weights.folder}: `{path}` is made of {len(keys)} tensors and cannot be taken apart "
            f"into them again. {REMEDY}"
        )
    return Built(keys, {name: tuple(v.shape) for name, v in made.items()}, make, undo)
