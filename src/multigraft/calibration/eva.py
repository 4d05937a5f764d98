"""EVA with data: directions of each layer's inputs, and how many ranks each layer gets.

`get_eva_state_dict` shows the data to the model until the directions stand still;
`initialize_lora_eva_weights` gives them to an adapter. See `multigraft.initialisations.eva`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.calibration.incremental import Directions
from multigraft.calibration.inputs import (
    all_rows,
    fingerprint,
    forward_fn_dict,
    moved,
    of_all_ranks,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from multigraft.calibration.places import Place, evaluating, places_of, watched
from multigraft.calibration.ranks import Layer, distribute, give
from multigraft.errors import ConfigError, DataError, MultigraftWarning, StateError
from multigraft.keys import strip_prefix
from multigraft.methods.lora import LoraConfig
from multigraft.model import PeftModel

LayerInputs = Callable[[Any, Any, str], Tensor]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """EVA's directions of each linear layer's inputs, ``(rank, in)``, by the layer's name.

    The data is gone through as often as it takes for the directions to stand still.

    Args:
        model: a base model, or a `PeftModel`, whose adapters are disabled meanwhile.
        dataloader: batches; it is iterated over again and again.
        peft_config: the adapter's config, for a base model.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: makes of a batch, with the config, what the next one is given.
        prepare_layer_inputs_fn: makes of a layer's input the rows that count, ``(n, in)``; one for
            all, or by the layer's name; None for all rows.
        gather_distributed_inputs: in several processes, look at the rows of all.
        show_progress_bar: show how many layers stand still, where tqdm is installed.

    Raises:
        ConfigError: there is no config with EVA's options.
        DataError: there is no batch, or none with enough rows.
    """
    handle = model if isinstance(model, PeftModel) else None
    config: Any = peft_config
    if handle is not None and config is None:
        config = handle.peft_config[handle.roster.require_one(adapter_name)]
    if not isinstance(config, LoraConfig) or config.eva_config is None:
        raise ConfigError(
            f"get_eva_state_dict: `peft_config` (={type(config).__name__}) must be a LoraConfig "
            'with init_lora_weights="eva".'
        )
    places = places_of(model, config, None if handle is None else adapter_name)
    functions = _by_name(prepare_layer_inputs_fn, places)
    study = _Study(config, places, functions, gather_distributed_inputs)
    with handle.disable_adapter() if handle else nullcontext(), evaluating(model):
        run = _runner(model, config, forward_fn or forward_fn_dict, prepare_model_inputs_fn, study)
        study.begin(run, next(iter(dataloader), None))
        for batch in _progress(dataloader, study, show_progress_bar):
            study.go_on(run, batch)
    return study.result()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter begin at EVA's directions, with the ranks that go with them.

    The model's own config of the adapter then names its ranks, and no layer that got none.

    Args:
        model: a `PeftModel` with an adapter whose `init_lora_weights` is ``"eva"``.
        eva_state_dict: what `get_eva_state_dict` gave; otherwise it is called with the data and
            the other arguments, which are its own.

    Raises:
        StateError: the model has no such adapter, or it is merged.
        ConfigError: the adapter begins otherwise, or neither data nor directions are given.
    """
    handle = _with_eva(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError(
                "initialize_lora_eva_weights: give `dataloader`, or the `eva_state_dict` that "
                "get_eva_state_dict() gave."
            )
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    give(handle, adapter_name, {strip_prefix(key): value for key, value in eva_state_dict.items()})


def _with_eva(model: nn.Module, adapter_name: str) -> PeftModel:
    """The model, if it has this adapter and that begins by EVA."""
    if not isinstance(model, PeftModel):
        raise StateError(
            f"initialize_lora_eva_weights: `model` (={type(model).__name__}) must be a PeftModel; "
            "call get_peft_model() first."
        )
    model.roster.require_one(adapter_name)
    init = getattr(model.peft_config[adapter_name], "init_lora_weights", None)
    if init != "eva":
        raise ConfigError(
            f"initialize_lora_eva_weights: `init_lora_weights` (={init!r}) of adapter "
            f'`{adapter_name}` must be "eva".'
        )
    return model


class _Study:
    """What is known of the layers' inputs so far."""

    def __init__(
        self,
        config: LoraConfig,
        places: Sequence[Place],
        functions: Mapping[str, LayerInputs],
        gather: bool,
    ) -> None:
        self.config = config
        self.places = list(places)
        self.functions = functions
        self.gather = gather
        self.context: Any = None
        self.layers: dict[str, Layer] = {}
        self.ranks: dict[str, int] = {}
        self.has_learnt = False

    def begin(self, run: Callable[[Any], None], batch: Any) -> None:
        """Find the layers that see the same input, which are studied once."""
        if batch is None:
            raise DataError("EVA: `dataloader` is empty; give it at least one batch.")
        seen: dict[str, Any] = {}
        see = lambda p, x: seen.setdefault(p.name, fingerprint(self.rows(p, x)))  # noqa: E731
        with watched(self.places, see):
            run(batch)
        idle = [p.name for p in self.places if p.name not in seen]
        if idle:
            warnings.warn(
                f"EVA: {', '.join(idle[:3])} did not run on the data, and keep their random start.",
                MultigraftWarning,
                stacklevel=4,
            )
        self.places = [place for place in self.places if place.name in seen]
        first: dict[Any, str] = {}
        for place in self.places:
            source = first.setdefault(seen[place.name], place.name)
            most = min(round(place.rank * self.config.eva_config.rho), place.sizes[0])
            self.layers[place.name] = Layer(place, source, most)
        for layer in self.layers.values():
            group = [x.most for x in self.layers.values() if x.source == layer.source]
            self.layers[layer.source].most = max(group)
        for layer in self.layers.values():
            layer.most = self.layers[layer.source].most
            layer.directions = Directions(layer.most)
            layer.converged = torch.zeros(layer.most, dtype=torch.bool)
        self.ranks = {name: layer.most for name, layer in self.layers.items()}

    def moving(self) -> list[Layer]:
        """The layers whose directions do not stand still yet."""
        return [
            layer
            for name, layer in self.layers.items()
            if layer.source == name and not bool(layer.converged[: self.ranks[name]].all())
        ]

    def go_on(self, run: Callable[[Any], None], batch: Any) -> None:
        """Take in one batch, and distribute the ranks anew."""
        moving = [layer.place for layer in self.moving()]
        with watched(moving, self._learn):
            run(batch)
        own = [layer for name, layer in self.layers.items() if layer.source == name]
        if all(layer.directions.seen for layer in own):
            self.ranks = distribute(self.layers)

    def _learn(self, place: Place, x: Any) -> None:
        layer, rows = self.layers[place.name], self.rows(place, x)
        if len(rows) < layer.most:
            return
        self.has_learnt = True
        is_first = not layer.directions.seen
        cosines = layer.directions.update(rows.float())
        if not is_first:
            layer.converged = cosines >= self.config.eva_config.tau

    def rows(self, place: Place, x: Any) -> Tensor:
        """What counts of a layer's input, ``(n, in)``."""
        rows = self.functions[place.name](x, self.context, place.name)
        return of_all_ranks(rows) if self.gather else rows

    def result(self) -> dict[str, Tensor]:
        """Directions by the layers' names, as many as each layer gets."""
        found = {}
        for name, rank in self.ranks.items():
            directions = self.layers[self.layers[name].source].directions
            V = directions.components[:rank]
            if self.config.eva_config.whiten:
                V = V / directions.values[:rank, None].sqrt()
            found[name] = V.clone(memory_format=torch.contiguous_format)
        return found


def _by_name(given: Any, places: Sequence[Place]) -> dict[str, LayerInputs]:
    """The function for each layer.

    Raises:
        ConfigError: one is given for a layer that is not studied.
    """
    if not isinstance(given, Mapping):
        return {place.name: given or all_rows for place in places}
    table = {strip_prefix(name): function for name, function in given.items()}
    unknown = sorted(table.keys() - {place.path for place in places})
    if unknown:
        raise ConfigError(
            f"prepare_layer_inputs_fn: {unknown} are no linear layers of the adapter. It acts on "
            f"{', '.join(place.name for place in places[:5])}."
        )
    return {place.name: table.get(place.path, all_rows) for place in places}


def _runner(
    model: nn.Module,
    config: LoraConfig,
    forward: Callable[..., Any],
    prepare: Callable[..., Any] | None,
    study: _Study,
) -> Callable[[Any], None]:
    """What runs the model on a batch, after the study was told what of it counts."""
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    device = devices.pop() if len(devices) == 1 else None

    def run(batch: Any) -> None:
        batch = moved(batch, device)
        study.context = prepare(batch, config) if prepare else copy.copy(batch)
        forward(model, batch)

    return run


def _progress(dataloader: Iterable[Any], study: _Study, show: bool) -> Iterator[Any]:
    """Batches, over and over, until every layer's directions stand still."""
    bar = _bar(len(study.layers)) if show else None
    while left := study.moving():
        study.has_learnt = False
        for batch in dataloader:
            if bar is not None:
                bar.n = len(study.layers) - len(left)
                bar.refresh()
            yield batch
            left = study.moving()
            if not left:
                break
        if left and not study.has_learnt:
            most = max(layer.most for layer in left)
            raise DataError(
                f"EVA: no batch has as many rows that count as a layer may get ranks ({most}), or "
                "`dataloader` cannot be iterated over twice. Take larger batches, or a smaller `r` "
                "or `rho`; pass a list or a DataLoader."
            )
    if bar is not None:
        bar.close()


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm(total=total, desc="EVA: layers that stand still", leave=False)
