"""A model of nothing but the layers that adapters act on, by what their files tell.

Arithmetic on factors needs a layer's sizes and no weight, so this stands in for the base there. Its
layers hold no values and take no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import CheckpointError
from multigraft.initialisations import initialisation_for
from multigraft.inspection import AdapterFiles
from multigraft.variants import variant_for

PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
BESIDE = ("lora_B.bias",)
VECTOR = "ia3_l"
NAMES = (*(name for pair in PAIRS for name in pair), *BESIDE, VECTOR)


class Shell(nn.Module):
    """The container that stands in for every module that adapters do not act on."""


def reasons_for_base(files: AdapterFiles) -> list[str]:
    """Why combining this adapter needs the base's weights or shapes; empty where it does not."""
    config: Any = files.config
    found = []
    if str(config.peft_type) == "LORA":
        variant, start = variant_for(config), initialisation_for(config)
        if variant is not None and (variant.needs_weight or not variant.combines):
            found.append(f"what LoRA's variant `{variant.name}` does depends on its layers")
        if start.takes_out or start.from_weight:
            found.append("it began with a part of the base's weights")
    if getattr(config, "modules_to_save", None):
        found.append(f"its saved modules ({', '.join(config.modules_to_save)}) are changes of it")
    if getattr(config, "trainable_token_indices", None):
        found.append("its trained tokens are changes of the base's")
    if getattr(config, "bias", "none") != "none":
        found.append("its biases are changes of the base's")
    if getattr(config, "target_parameters", None) or any("base_layer." in k for k in files.tensors):
        found.append("the shapes of the parameters that it acts on stand in the base alone")
    if any(t.dim() > 2 for t in files.tensors.values()):
        found.append("what a convolution does with its factors stands in the base alone")
    if not found:
        left = [key for key in files.tensors if not key.endswith(tuple(f".{n}" for n in NAMES))]
        if left:
            found.append(f"`{left[0]}` is no part of a low-rank pair")
    return found


def shell_of(adapters: Iterable[AdapterFiles]) -> nn.Module:
    """A model that has a layer of the right sizes wherever one of these adapters acts.

    Raises:
        CheckpointError: two of them need layers of different sizes at one path.
    """
    root: nn.Module = Shell()
    layers: dict[str, tuple[bool, int, int, torch.dtype]] = {}
    for files in adapters:
        for path, sizes in _sizes(files):
            known = layers.setdefault(path, sizes)
            both = list(zip(known[1:3], sizes[1:3], strict=True))
            if known[0] != sizes[0] or any(a and b and a != b for a, b in both):
                raise CheckpointError(
                    f"{files.folder}: the layer {path} is {sizes[1:3]} (in, out) there, and "
                    f"{known[1:3]} for another of the adapters. Were they trained on one base?"
                )
            in_, out = (a or b for a, b in both)
            layers[path] = (known[0], in_, out, known[3])
    for path, (is_lookup, in_, out, dtype) in layers.items():
        _hang(root, path, _layer(is_lookup, in_ or 1, out or 1, dtype))
    return root


def _sizes(files: AdapterFiles) -> Iterator[tuple[str, tuple[bool, int, int, torch.dtype]]]:
    """Path to whether it is an embedding, its sizes (0 where the file does not tell), its dtype."""
    for key, tensor in files.tensors.items():
        for number, (a_name, b_name) in enumerate(PAIRS):
            path = key.removesuffix(f".{a_name}")
            other = files.tensors.get(f"{path}.{b_name}")
            if path != key and other is not None:
                yield path, (number == 1, tensor.shape[1], other.shape[0], tensor.dtype)
        path = key.removesuffix(f".{VECTOR}")
        if path != key:
            is_input = tensor.shape[0] == 1 and tensor.shape[-1] != 1
            in_, out = (tensor.numel(), 0) if is_input else (0, tensor.numel())
            yield path, (False, in_, out, tensor.dtype)


def _layer(is_lookup: bool, in_: int, out: int, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        layer: Any = nn.Embedding(in_, out) if is_lookup else nn.Linear(in_, out, bias=False)
    one = torch.zeros(1, dtype=dtype)
    layer.weight = nn.Parameter(one.expand(layer.weight.shape), requires_grad=False)
    found: nn.Module = layer
    return found


def _hang(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        # torch types a child as perhaps None; those here are ours.
        root = root._modules.setdefault(parent, Shell())  # type: ignore[assignment]
    root._modules[name] = layer


def is_as_named(config: Any, sources: Sequence[Any], filters: Mapping[str, Any]) -> bool:
    """Whether a combined config's targets are the sources' own, and mean the same on the base.

    What was found by looking at the shell alone may mean more there.
    """
    named = [source.target_modules for source in sources]
    same = all(getattr(s, f) == getattr(sources[0], f) for s in sources for f in filters)
    if not same or any(each in (None, "all-linear") for each in named):
        return False
    if all(isinstance(each, str) for each in named):
        joined = "|".join(f"({each})" for each in dict.fromkeys(named))
        return config.target_modules in (named[0], joined)
    if any(isinstance(each, str) for each in named):
        return False
    found: bool = set(config.target_modules) == {name for each in named for name in each}
    return found


def tensors_of(adapters: Iterable[AdapterFiles]) -> Iterator[Tensor]:
    """Every tensor of all of them."""
    for files in adapters:
        yield from files.tensors.values()
