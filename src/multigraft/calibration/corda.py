"""CorDA with data: the covariance of the layers' inputs; see `multigraft.initialisations.corda`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.calibration.files import keep, kept, taken
from multigraft.calibration.places import Place, evaluating, places_of, watched
from multigraft.errors import ConfigError, DataError
from multigraft.initialisations.corda import FOUND, Components, CordaConfig, components
from multigraft.methods.lora import LoraConfig


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find where a CorDA adapter of this config begins on this model.

    What is found is remembered for as long as the model's layers live; they are not changed.

    Args:
        model: the base model that the adapter is for.
        lora_config: its config, with CorDA's options in `corda_config`.
        run_model: runs the model on sample data; not needed where one of the options' files
            exists.
        hooked_model: the model that ``run_model`` runs, with layers of the same names, if it is
            another one.

    Raises:
        ConfigError: the config is none for CorDA, or there is neither data nor file.
        DataError: the inputs of a layer tell nothing.
        CheckpointError: a file is damaged, or of another model or rank.
    """
    options = getattr(lora_config, "corda_config", None)
    if not isinstance(options, CordaConfig):
        raise ConfigError(
            f"preprocess_corda: `lora_config` (={type(lora_config).__name__}) must be a LoraConfig "
            'with init_lora_weights="corda".'
        )
    places = places_of(model, lora_config)
    cache = kept(options.cache_file)
    if cache is not None:
        for place in places:
            FOUND[place.site.layer] = _of_cache(cache, place, options)
        return
    covariances = _covariances(model, places, lora_config, run_model, hooked_model)
    for place in _shown(places, options.verbose):
        try:
            found = components(
                place.weight(), covariances[place.path], place.rank, options.corda_method
            )
        except DataError as error:
            raise DataError(f"CorDA: {place.path}: {error}") from None
        FOUND[place.site.layer] = found
    named = {place.path: FOUND[place.site.layer] for place in places}
    keep(
        options.cache_file,
        {f"{path}.eigens.{n}_WC": getattr(x, n) for path, x in named.items() for n in "SUV"},
    )


def _of_cache(cache: dict[str, Tensor], place: Place, options: CordaConfig) -> Components:
    in_, out = place.sizes
    shapes = {"S": (place.rank,), "U": (out, place.rank), "V": (in_, place.rank)}
    return Components(
        *(
            taken(cache, f"{place.path}.eigens.{name}_WC", options.cache_file, shape)
            for name, shape in shapes.items()
        )
    )


def _covariances(
    model: nn.Module,
    places: Sequence[Place],
    config: LoraConfig,
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """Covariance of each layer's inputs, ``(in, in)``, by path, on the layer's device."""
    path = config.corda_config.covariance_file
    held = kept(path)
    if held is not None:
        sizes = {place: place.sizes[0] for place in places}
        found = {p.path: taken(held, p.path, path, (n, n)) for p, n in sizes.items()}
        return {p.path: found[p.path].to(p.site.device) for p in places}
    if run_model is None:
        raise ConfigError(
            "preprocess_corda: give `run_model`, which runs the model on sample data, unless "
            "`cache_file` or `covariance_file` of `corda_config` exists."
        )
    runs = places if hooked_model is None else places_of(hooked_model, config)
    with evaluating(hooked_model or model):
        found = _averages(runs, run_model, config.corda_config.use_float16_for_covariance)
    idle = [place.path for place in places if place.path not in found]
    if idle:
        raise DataError(
            f"CorDA: {', '.join(idle[:3])} did not run on the data; let run_model() use every "
            "target, or leave them out of `target_modules`."
        )
    keep(path, found)
    return found


def _averages(
    places: Sequence[Place], run_model: Callable[[], None], narrow: bool
) -> dict[str, Tensor]:
    """X Xᵀ of each layer's inputs, averaged over its calls, by path."""
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def see(place: Place, x: Any) -> None:
        rows = x[0].reshape(-1, x[0].shape[-1])
        rows = rows if narrow else rows.float()
        rows = rows / rows.max().abs()
        if not torch.isfinite(rows).all():
            raise DataError(
                f"CorDA: the input of {place.path} is zero, or holds NaN or infinity; look at the "
                "data that run_model() runs the model on."
            )
        sums[place.path] = sums.get(place.path, 0) + rows.T @ rows
        calls[place.path] = calls.get(place.path, 0) + 1

    with watched(places, see):
        run_model()
    return {path: total / calls[path] for path, total in sums.items()}


def _shown(places: Sequence[Place], verbose: bool) -> Any:
    """The places, behind a progress bar if asked and where tqdm is installed."""
    if not verbose:
        return places
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return places
    return tqdm(places, desc="CorDA: components")
