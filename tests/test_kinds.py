"""`isinstance` answers for adapted layers as it does for PEFT's."""

from __future__ import annotations

import copy

import peft
import peft.tuners as tuners
import pytest
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

import multigraft
from multigraft import kinds

PAIRS = {
    "BaseTunerLayer": BaseTunerLayer,
    "LoraLayer": tuners.lora.LoraLayer,
    "AdaLoraLayer": AdaLoraLayer,
    "HiraLayer": tuners.hira.HiraLayer,
    "IA3Layer": tuners.ia3.IA3Layer,
    "LNTuningLayer": LNTuningLayer,
    "LoHaLayer": tuners.loha.LoHaLayer,
    "LoKrLayer": tuners.lokr.LoKrLayer,
    "OFTLayer": tuners.oft.OFTLayer,
    "VeraLayer": tuners.vera.VeraLayer,
    "ModulesToSaveWrapper": ModulesToSaveWrapper,
}
CONFIGS = {
    "LoraConfig": {"target_modules": ["0"], "modules_to_save": ["2"]},
    "AdaLoraConfig": {"target_modules": ["0"], "total_step": 10},
    "HiraConfig": {"target_modules": ["0"]},
    "IA3Config": {"target_modules": ["0"], "feedforward_modules": []},
    "LNTuningConfig": {"target_modules": ["1"]},
    "LoHaConfig": {"target_modules": ["0"]},
    "LoKrConfig": {"target_modules": ["0"]},
    "OFTConfig": {"target_modules": ["0"], "r": 2, "oft_block_size": 0},
    "VeraConfig": {"target_modules": ["0"]},
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_is_what_pefts_layer_is(name: str) -> None:
    options = CONFIGS[name]
    ours, theirs = net(), net()
    multigraft.get_peft_model(ours, getattr(multigraft, name)(**options))
    peft.get_peft_model(theirs, getattr(peft, name)(**copy.deepcopy(options)))
    told = [{k for k in PAIRS if isinstance(layer, getattr(kinds, k))} for layer in ours]
    expected = [{k for k, kind in PAIRS.items() if isinstance(layer, kind)} for layer in theirs]
    assert told == expected
    assert any(told)


def test_a_layer_is_of_a_kind_for_as_long_as_such_an_adapter_is_there() -> None:
    base = net()
    model = multigraft.get_peft_model(base, multigraft.LoraConfig(target_modules=["0"]), "a")
    model.add_adapter("b", multigraft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    layer = base[0]
    assert isinstance(layer, multigraft.LoraLayer)
    assert isinstance(layer, kinds.IA3Layer)
    model.delete_adapter("a")
    assert not isinstance(layer, multigraft.LoraLayer)
    assert isinstance(layer, kinds.IA3Layer)
    assert isinstance(layer, multigraft.BaseTunerLayer)


def test_a_trained_bias_makes_no_layer_one_of_a_method() -> None:
    base = net()
    config = multigraft.LoraConfig(target_modules=["0"], bias="all")
    multigraft.get_peft_model(base, config)
    assert isinstance(base[2], multigraft.AdaptedLayer)
    assert not isinstance(base[2], multigraft.BaseTunerLayer)


def test_token_adapters_make_an_embedding_one_of_their_kind() -> None:
    base = nn.Sequential(nn.Embedding(5, 4))
    config = multigraft.TrainableTokensConfig(target_modules=["0"], token_indices=[1])
    multigraft.get_peft_model(base, config)
    assert isinstance(base[0], kinds.TrainableTokensLayer)
    assert not isinstance(base[0], multigraft.LoraLayer)


@pytest.mark.parametrize("name", PAIRS)
def test_none_of_them_can_be_made(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is for isinstance"):
        getattr(kinds, name)()
