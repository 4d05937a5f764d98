"""LoRA-GA with data: the weights' gradients; see `multigraft.initialisations.lora_ga`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from multigraft.calibration.files import keep, kept, taken
from multigraft.calibration.places import Place, evaluating, places_of
from multigraft.errors import ConfigError, DataError, UnsupportedError
from multigraft.initialisations.lora_ga import FOUND, LoraGAConfig, leading
from multigraft.methods.lora import LoraConfig


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], None],
    cache_file: str | None = None,
) -> None:
    """Find where a LoRA-GA adapter of this config begins on this model.

    What is found is remembered for as long as the model's layers live. Gradients, modes and
    ``requires_grad`` flags of the model are as before afterwards.

    Args:
        model: the base model that the adapter is for.
        lora_config: its config, with LoRA-GA's options in `lora_ga_config`.
        train_step: runs the model on data, forward and backward, as often as it likes; gradients
            are averaged.
        cache_file: where the gradients are kept; if there is such a file, they are taken from it.

    Raises:
        ConfigError: the config is none for LoRA-GA.
        UnsupportedError: a layer is quantised, so that it has no gradient.
        DataError: a layer got none, or one that is not finite.
        CheckpointError: the file is damaged, or of another model.
    """
    if not isinstance(getattr(lora_config, "lora_ga_config", None), LoraGAConfig):
        raise ConfigError(
            f"preprocess_loraga: `lora_config` (={type(lora_config).__name__}) must be a "
            'LoraConfig with init_lora_weights="lora_ga".'
        )
    places = places_of(model, lora_config)
    weights = {place: _weight(place) for place in places}
    cache = kept(cache_file)
    if cache is None:
        gradients = _estimated(model, weights, train_step)
        keep(cache_file, {_key(place): gradient for place, gradient in gradients.items()})
    else:
        gradients = {
            p: taken(cache, _key(p), cache_file, tuple(W.shape)).to(W.device)
            for p, W in weights.items()
        }
    for place, gradient in gradients.items():
        FOUND[place.site.layer] = leading(place.as_matrix(gradient), place.rank)


def _key(place: Place) -> str:
    """Its name in PEFT's file."""
    return f"{place.path}._peft_loraga_grad"


def _weight(place: Place) -> nn.Parameter:
    weight = place.site.layer._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise UnsupportedError(
            f"LoRA-GA: {place.path} is quantised or computes its weight, so there is no gradient "
            "of it. Call preprocess_loraga() on the model before it is quantised."
        )
    return weight


def _estimated(
    model: nn.Module, weights: dict[Place, nn.Parameter], train_step: Callable[[], None]
) -> dict[Place, Tensor]:
    """The mean gradient of each weight over the backward passes that reach it."""
    counts = dict.fromkeys(weights, 0)

    def count(place: Place) -> Callable[[Tensor], None]:
        def reached(_: Tensor) -> None:
            counts[place] += 1

        return reached

    with _alone(model, list(weights.values())), evaluating(model, mode=True):
        handles = [
            weight.register_post_accumulate_grad_hook(count(place))
            for place, weight in weights.items()
        ]
        try:
            with torch.enable_grad():
                train_step()
            found = {p: W.grad / counts[p] for p, W in weights.items() if W.grad is not None}
        finally:
            for handle in handles:
                handle.remove()
    for place in weights:
        if place not in found or not torch.isfinite(found[place]).all():
            what = "got no gradient" if place not in found else "got NaN or infinity as gradient"
            raise DataError(
                f"LoRA-GA: {place.path} {what}; let train_step() run the model and call backward() "
                "on a loss that depends on every target."
            )
    return found


@contextmanager
def _alone(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these weights alone; afterwards flags and gradients are as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    try:
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
