"""From a config to an adapter that is ready to attach: checked first, made second."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, get_peft_model
from multigraft.checkpoint import adapter_state
from multigraft.keys import disk_names
from multigraft.prepare import Prepared, prepare
from tests.oracle import Net as EveryKind
from tests.oracle import Stack, gpt2
from tests.subject import Net, Subject

RICH: dict[str, Any] = {
    "target_modules": ["emb", "lin0", "turned", "conv1", "lin1"],
    "modules_to_save": ["head"],
    "bias": "all",
    "r": 3,
}
"""Every kind of tensor that an adapter can have."""


def prepared(model: nn.Module, **options: Any) -> Prepared:
    return prepare(model, "default", LoraConfig(**options))


def grown(ready: Prepared, given: dict[str, Tensor], on_meta: bool = False) -> dict[str, Tensor]:
    """What `grow` makes, by key on disk."""
    made = {}
    for scion in ready.grow(given, True, on_meta):
        tensors = scion.tensors if scion.module is None else scion.module.state_dict()
        for name, spec in scion.graft.method.tensors().items():
            made[disk_names(scion.graft.site, spec.on_disk or name)] = tensors[name]
    return made


def test_preparing_touches_neither_model_nor_random_numbers() -> None:
    subject, state = Subject(), torch.get_rng_state()
    prepare(subject.base, "default", subject.config(bias="all", modules_to_save=["conv"]))
    subject.assert_restored()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_expected_is_what_is_made_and_what_is_saved() -> None:
    ready = prepared(EveryKind(), **RICH)
    made = {key: tuple(t.shape) for key, t in grown(ready, {}).items()}
    model = get_peft_model(EveryKind(), LoraConfig(**RICH))
    saved = {k: tuple(t.shape) for k, t in adapter_state(model.roster, "default").items()}
    assert ready.expected() == made == saved


def test_when_everything_is_given_no_random_number_is_drawn() -> None:
    ready = prepared(EveryKind(), **RICH)
    given = {key: torch.randn(shape) for key, shape in ready.expected().items()}
    state = torch.get_rng_state()
    made = grown(ready, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(made[key], given[key]) for key in given)


def test_given_tensors_are_copied_and_stay_the_callers() -> None:
    ready = prepared(EveryKind(), **RICH)
    given = {key: torch.randn(shape) for key, shape in ready.expected().items()}
    pointers = {tensor.data_ptr() for tensor in given.values()}
    assert not pointers & {tensor.data_ptr() for tensor in grown(ready, given).values()}


def test_what_is_not_given_is_initialised_beside_what_is() -> None:
    ready = prepared(Net(), target_modules=["head"], r=2)
    made = grown(ready, {"head.lora_B.weight": torch.ones(5, 2)})
    assert bool((made["head.lora_B.weight"] == 1).all())
    assert float(made["head.lora_A.weight"].std()) > 0.05


def test_on_the_meta_device_nothing_is_allocated_or_drawn() -> None:
    ready = prepared(EveryKind(), target_modules=["emb", "lin0", "conv1"])
    state = torch.get_rng_state()
    made = grown(ready, {}, on_meta=True)
    assert all(tensor.is_meta for tensor in made.values())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_have_the_bases_dtype_but_float32_on_half_precision_if_wanted(
    base: torch.dtype, autocast: bool
) -> None:
    ready = prepared(Net().to(base), target_modules=["head", "emb", "conv"])
    scions = ready.grow({}, autocast, False)
    expected = torch.float32 if autocast and base.itemsize == 2 else base
    assert {t.dtype for scion in scions for t in scion.tensors.values()} == {expected}


def test_the_models_copy_of_the_config_says_what_was_meant() -> None:
    config = LoraConfig(target_modules="all-linear", r=2)
    ready = prepare(Net(), "default", config)
    assert ready.config.target_modules == ["down", "head", "up"]  # type: ignore[attr-defined]
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize(
    "options", [{"exclude_modules": ["layers.1.q_proj"]}, {"layers_to_transform": [0, 2]}]
)
def test_what_filters_left_of_all_linear_is_named_in_full(options: dict[str, Any]) -> None:
    ready = prepared(Stack(), target_modules="all-linear", **options)
    named = ready.config.target_modules  # type: ignore[attr-defined]
    assert named == sorted(need.site.path for need, _ in ready.parts)
    assert "layers.1.q_proj" not in named


def test_no_targets_are_written_as_the_architectures_usual_ones() -> None:
    assert prepared(gpt2()).config.target_modules == ["c_attn"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("said", [True, False])
def test_the_layers_say_how_they_are_stored_whatever_the_config_said(said: bool) -> None:
    turned = prepared(EveryKind(), target_modules=["turned"], fan_in_fan_out=said)
    plain = prepared(EveryKind(), target_modules=["lin0"], fan_in_fan_out=said)
    assert [p.config.fan_in_fan_out for p in (turned, plain)] == [True, False]  # type: ignore[attr-defined]
