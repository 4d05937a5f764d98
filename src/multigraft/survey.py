"""The base view of a model: its modules under their base paths, wrappers seen through.

An adapted layer appears as its base layer, and nothing inside it is visited. So whatever looks for
sites finds the same ones however many adapters there are, and can never find an adapter's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from multigraft.bases import HOSTS
from multigraft.errors import NestingError
from multigraft.layer import AdaptedLayer
from multigraft.registry import TypeRegistry, qualified_name

TRANSPARENT = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Child names through which wrappers of torch hold the real module; they are no part of a path."""

TRANSPARENT_TYPES: TypeRegistry[bool] = TypeRegistry("transparent wrapper")
TRANSPARENT_TYPES.register(
    "torch._dynamo.eval_frame.OptimizedModule",
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
)(True)
FOREIGN_ADAPTERS: TypeRegistry[bool] = TypeRegistry("foreign adapter")
FOREIGN_ADAPTERS.register(
    "peft.tuners.tuners_utils.BaseTunerLayer", "peft.utils.other.AuxiliaryTrainingWrapper"
)(True)


@dataclass(eq=False)
class Spot:
    """One module of the base model, wherever it hangs.

    Args:
        layer: the base module.
        paths: its base paths; more than one when the module is shared. The first one names it.
        places: the (parent, child name) pairs that hold it or its wrapper.
        wrapper: the adapted layer around it, if there is one.
        host: the module that reads this one's tensors and never runs it; adapters of this one
            live at the host.
        hosted: what this module is the host of, by the child's name.
    """

    layer: nn.Module
    paths: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    wrapper: AdaptedLayer | None = None
    host: Spot | None = None
    hosted: dict[str, Spot] = field(default_factory=dict)

    @property
    def inner(self) -> str:
        """This module's name in its host."""
        return self.places[0][1] if self.host is not None else ""

    @property
    def is_hosted(self) -> bool:
        """Whether it never runs; without a `host` when that is the model itself."""
        return any(name in _hosted(parent) for parent, name in self.places)

    @property
    def path(self) -> str:
        """The path that names this module in configs and files."""
        return self.paths[0]


def survey(model: nn.Module) -> list[Spot]:
    """Every module of the base model below ``model`` itself, in the order of `named_modules`.

    Raises:
        NestingError: the model is itself an adapted layer, holds one inside another, or carries
            adapters of another library.
    """
    if isinstance(model, AdaptedLayer):
        raise NestingError(
            f"the given model is the adapted layer at {model.path}; grafting onto its insides "
            "would nest one adapter in another. Add the adapter to the model that holds it."
        )
    _refuse_foreign(model, "the given model")
    spots: dict[int, Spot] = {}
    children: list[Child] = []
    _collect(model, "", children)
    for path, parent, name, module in children:
        wrapper = module if isinstance(module, AdaptedLayer) else None
        layer = wrapper.base_layer if wrapper is not None else module
        _refuse_foreign(layer, path)
        if wrapper is not None and layer._modules:
            _refuse_nested(wrapper, path)
        spot = spots.get(id(layer))
        if spot is None:
            spot = spots[id(layer)] = Spot(layer)
        spot.paths.append(path)
        spot.places.append((parent, name))
        spot.wrapper = wrapper or spot.wrapper
        if name in _hosted(parent) and id(parent) in spots:
            spot.host = spots[id(parent)]
            spot.host.hosted[name] = spot
    return list(spots.values())


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The adapted layers of a model, each once."""
    return [s.wrapper for s in survey(model) if s.wrapper is not None]


Child = tuple[str, nn.Module, str, nn.Module]
"""Base path, parent, name there, module."""


def _collect(module: nn.Module, prefix: str, found: list[Child]) -> None:
    """Append what is below ``module``, depth first; not what is below adapted layers."""
    is_transparent = TRANSPARENT_TYPES.find(type(module))
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == "parametrizations" and is_parametrized(module):
            continue  # how the parent's weight is stored, and no layer of the model
        if is_transparent and name in TRANSPARENT:
            _collect(child, prefix, found)
            continue
        path = f"{prefix}{name}"
        parent, name, child = _seen_through(module, name, child)
        found.append((path, parent, name, child))
        if isinstance(child, AdaptedLayer):
            base = child.base_layer
            found += [(f"{path}.{n}", base, n, base._modules[n]) for n in _hosted(base)]  # type: ignore[misc]
        elif child._modules:
            _collect(child, f"{path}.", found)


def _hosted(parent: nn.Module) -> frozenset[str]:
    """Names of the children that this module never runs."""
    return HOSTS.find(type(parent)) or frozenset()


def _seen_through(
    parent: nn.Module, name: str, child: nn.Module
) -> tuple[nn.Module, str, nn.Module]:
    """The child without transparent wrappers around it, and where that hangs."""
    while TRANSPARENT_TYPES.find(type(child)):
        held = next((n for n in child._modules if n in TRANSPARENT), None)
        inner = child._modules[held] if held is not None else None
        if held is None or inner is None:
            break
        parent, name, child = child, held, inner
    return parent, name, child


def _refuse_nested(wrapper: AdaptedLayer, path: str) -> None:
    """Fail when an adapted layer holds another one.

    A module that is copied whole has insides, which may have been adapted as a model of their own;
    leaf layers, which are the many, have none to look at.
    """
    for name, module in wrapper.named_modules():
        if isinstance(module, AdaptedLayer) and module is not wrapper:
            raise NestingError(
                f"{path}.{name} was adapted by itself, inside the adapted layer {path}. Unload it "
                "there, and adapt both through the whole model."
            )


def _refuse_foreign(layer: nn.Module, path: str) -> None:
    if FOREIGN_ADAPTERS.find(type(layer)):
        raise NestingError(
            f"{path} carries an adapter of another library ({qualified_name(type(layer))}); "
            "grafting onto it would nest one adapter in another. Unload that adapter first "
            "(for PEFT: model = model.unload()), or load its checkpoint with Multigraft."
        )
