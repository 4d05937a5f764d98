"""`LoraModel(model, config, name)` and its siblings, beside PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import ConfigError, PeftType

OPTIONS = {
    "LORA": ("LoraConfig", {"target_modules": ["0"], "init_lora_weights": False}),
    "ADALORA": ("AdaLoraConfig", {"target_modules": ["0"], "total_step": 10, "init_r": 2}),
    "HIRA": ("HiraConfig", {"target_modules": ["0"], "init_weights": False}),
    "IA3": (
        "IA3Config",
        {"target_modules": ["0"], "feedforward_modules": [], "init_ia3_weights": False},
    ),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["1"]}),
    "LOHA": ("LoHaConfig", {"target_modules": ["0"], "init_weights": False}),
    "LOKR": ("LoKrConfig", {"target_modules": ["0"], "init_weights": False}),
    "OFT": ("OFTConfig", {"target_modules": ["0"], "r": 2, "oft_block_size": 0}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"target_modules": ["2"], "token_indices": [1]}),
    "VERA": ("VeraConfig", {"target_modules": ["0"], "init_weights": False}),
}
TUNERS = multigraft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x)) + self[2].weight[1]


@pytest.mark.parametrize("kind", OPTIONS)
def test_each_gives_what_pefts_gives(kind: str) -> None:
    name, options = OPTIONS[kind]
    x = torch.randn(3, 8)
    made = []
    for library in (multigraft, peft):
        config = getattr(library, name)(**copy.deepcopy(options))
        tuner = getattr(library, TUNERS[PeftType(kind)].__name__)
        base = Net()
        torch.manual_seed(1)
        model = tuner(base, config, "other")
        assert model.model is base
        assert type(model) is library.PEFT_TYPE_TO_TUNER_MAPPING[library.PeftType(kind)]
        assert list(model.peft_config) == ["other"]
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        assert {model.prefix in n for n, flag in flags.items() if flag} == {True}
        made.append((model(x), flags, dict(model.state_dict())))
    (ours, flags, state), (theirs, their_flags, their_state) = made
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    trained = {n for n, flag in flags.items() if flag}
    assert trained == {n for n, flag in their_flags.items() if flag}
    assert trained
    for key in trained:
        assert torch.equal(state[key], their_state[key])


def test_every_method_that_changes_weights_has_a_class() -> None:
    assert {str(kind) for kind in TUNERS} == set(OPTIONS)
    assert all(kind in tuner.methods for kind, tuner in TUNERS.items())


def test_every_method_has_a_class_of_pefts_name() -> None:
    every = multigraft.PEFT_TYPE_TO_TUNER_MAPPING
    assert set(every) == set(multigraft.PEFT_TYPE_TO_CONFIG_MAPPING)
    assert TUNERS.items() <= every.items()
    for kind, tuner in every.items():
        assert tuner.__name__ == peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(kind)].__name__


def test_a_models_tuner_is_of_the_kinds_of_its_adapters() -> None:
    config = multigraft.LoraConfig(target_modules=["0"])
    model = multigraft.get_peft_model(Net(), config)
    assert isinstance(model.base_model, multigraft.LoraModel)
    assert not isinstance(model.base_model, multigraft.IA3Model)
    model.add_adapter("b", multigraft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert isinstance(model.base_model, multigraft.IA3Model)
    assert not isinstance(model, multigraft.LoraModel)


def test_an_adalora_is_a_lora_and_not_the_other_way_round() -> None:
    lora = multigraft.LoraModel(Net(), multigraft.LoraConfig(target_modules=["0"]), "a")
    config = multigraft.AdaLoraConfig(target_modules=["0"], total_step=10)
    adalora = multigraft.get_peft_model(Net(), config).base_model
    assert isinstance(adalora, multigraft.LoraModel)
    assert isinstance(adalora, multigraft.AdaLoraModel)
    assert not isinstance(lora, multigraft.AdaLoraModel)


def test_of_a_dictionary_the_named_one_is_grafted() -> None:
    configs = {n: multigraft.LoraConfig(target_modules=[t]) for n, t in (("a", "0"), ("b", "0"))}
    tuner = multigraft.LoraModel(Net(), configs, "b")
    assert tuner.active_adapters == list(tuner.peft_config) == ["b"]
    with pytest.raises(ConfigError, match=r"has no `c`; it has \['a', 'b'\]"):
        multigraft.LoraModel(Net(), configs, "c")


def test_a_second_one_on_the_same_model_stands_beside_the_first() -> None:
    base = Net()
    layer = base[0]
    multigraft.LoraModel(base, multigraft.LoraConfig(target_modules=["0"]), "a")
    tuner = multigraft.LoraModel(base, multigraft.LoraConfig(target_modules=["0"]), "b")
    assert base[0].base_layer is layer
    assert list(tuner.peft_config) == ["a", "b"]
    assert tuner.unload()[0] is layer


def test_a_config_of_another_method_is_refused_and_the_model_left_alone() -> None:
    base = Net()
    layer = base[0]
    with pytest.raises(ConfigError, match="LoraModel begins with an adapter of ADALORA or LORA"):
        multigraft.LoraModel(base, multigraft.LoHaConfig(target_modules=["0"]), "a")
    assert base[0] is layer
