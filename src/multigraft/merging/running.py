"""Running a model whose weights stay in their files, in float32, a module's at a time in memory.

Weights are widened for a module's own call and let go after it; what is made of several tensors is
made for as long as the module, or the adapters around it, run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from multigraft.layer import AdaptedLayer
from multigraft.merging.base import MappedModel, held


@contextmanager
def streamed(base: MappedModel) -> Iterator[None]:
    """Let this model's modules run, wherever it is called from, for the length of the block."""
    hooks: list[Any] = []
    try:
        for module in base.model.modules():
            hooks += _made(base, module)
            if module._parameters and _is_mapped(module):
                hooks += _widened(base, module)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widened(base: MappedModel, module: nn.Module) -> list[Any]:
    own: list[dict[str, Any]] = []

    def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        own.append(dict(module._parameters))
        if not isinstance(module, nn.Embedding):  # of which a few rows are read
            for name, tensor in own[-1].items():
                module._parameters[name] = _wide_parameter(tensor)
        return tuple(map(_wide, args)), {key: _wide(value) for key, value in kwargs.items()}

    def narrow(module: nn.Module, args: Any, output: Any) -> Any:
        module._parameters.update(own.pop())
        base.weights.forget()
        return _wide(output)

    return [
        module.register_forward_pre_hook(widen, with_kwargs=True),
        module.register_forward_hook(narrow),
    ]


def _made(base: MappedModel, module: nn.Module) -> list[Any]:
    """Hooks that make what a module is made of, where it is; an adapted layer reads it as well."""
    inside = module.base_layer.modules() if isinstance(module, AdaptedLayer) else [module]
    paths = {
        path
        for each in inside
        for leaf in each._parameters
        for path in base.paths_at.get((id(each), leaf), ())
        if path in base.built
    }
    if not paths:
        return []
    lent: list[list[tuple[Tensor, Tensor]]] = []

    def lend(*_: Any) -> None:
        lent.append([])
        for path in paths:
            tensor = held(*base.places[path])
            if not any(tensor.stride()):  # zeros that take no memory: nobody has made it yet
                lent[-1].append((tensor, tensor.data))
                tensor.data = base.values_of(path)

    def take(*_: Any) -> None:
        for tensor, before in lent.pop():
            tensor.data = before

    return [module.register_forward_pre_hook(lend), module.register_forward_hook(take)]


def _is_mapped(module: nn.Module) -> bool:
    """Whether it is a module of the model itself, rather than one that holds adapters' tensors."""
    return type(module).__module__.partition(".")[0] != __name__.partition(".")[0]


def _wide_parameter(tensor: nn.Parameter | None) -> nn.Parameter | None:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype.itemsize > 2:
        return tensor
    return nn.Parameter(tensor.detach().float(), requires_grad=False)


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if is_narrow else value
