"""What is true of adapted layers and models now, in the dataclasses that PEFT's users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from multigraft.layer import AdaptedLayer
from multigraft.survey import adapted_layers

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """A whole model; ``"irregular"`` where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer, of a `PeftModel` or of a model adapted in place."""
    return [_layer(layer) for layer in adapted_layers(_root(model))]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the whole model."""
    root = _root(model)
    layers = adapted_layers(root)
    statuses = [_layer(layer) for layer in layers]
    roster = layers[0].roster if layers else getattr(model, "roster", None)
    configs = roster.configs if roster else {}
    contexts = {n: list(c.parameters()) for n in configs if roster and (c := roster.context_of(n))}
    parameters = [*root.parameters(), *(p for own in contexts.values() for p in own)]
    merged = [frozenset(x.merged_adapters) for x in layers]
    everywhere = {n for n in configs if any(n in m for m in merged)}
    is_regular = all(m == everywhere & set(x.grafts) for m, x in zip(merged, layers, strict=True))
    return TunerModelStatus(
        base_model_type=type(root).__name__,
        adapter_model_type=type(getattr(model, "base_model", model)).__name__,
        peft_types={name: str(config.peft_type) for name, config in configs.items()},
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        num_adapter_layers=len(layers),
        enabled=roster.enabled if roster else True,
        active_adapters=list(roster.active) if roster else [],
        merged_adapters=[n for n in configs if n in everywhere] if is_regular else "irregular",
        requires_grad={
            n: _agree(
                [s.requires_grad[n] for s in statuses if n in s.requires_grad]
                + [p.requires_grad for p in contexts.get(n, ())]
            )
            for n in configs
        },
        available_adapters=sorted(configs),
        devices={
            n: sorted(
                {d for s in statuses for d in s.devices.get(n, [])}
                | {p.device.type for p in contexts.get(n, ())}
            )
            for n in configs
        },
    )


def _layer(layer: AdaptedLayer) -> TunerLayerStatus:
    flags: dict[str, list[Any]] = {}
    devices: dict[str, set[str]] = {}
    for name, grafts in layer.grafts.items():
        flags[name] = [p.requires_grad for g in grafts for p in g.parameters()]
        devices[name] = {t.device.type for g in grafts for t in g.params.values()}
    return TunerLayerStatus(
        name=layer.path,
        module_type=type(layer.base_layer).__name__,
        enabled=layer.roster.enabled,
        active_adapters=[n for n in layer.roster.active if n in layer.grafts],
        merged_adapters=layer.merged_adapters,
        requires_grad={name: _agree(values) for name, values in flags.items()},
        available_adapters=sorted(layer.grafts),
        devices={name: sorted(kinds) for name, kinds in devices.items()},
        quantization_backend=None if layer.storage.name == "dense" else layer.storage.name,
    )


def _agree(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else "irregular" if values else False


def _root(model: nn.Module) -> nn.Module:
    base = getattr(model, "get_base_model", None)
    return (
        base()
        if callable(base)
        else getattr(model, "model", model)
        if hasattr(model, "roster")
        else model
    )
