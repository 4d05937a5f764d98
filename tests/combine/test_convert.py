"""Adapters of any method as plain LoRAs: the same outputs, and PEFT's pairs where it has any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import multigraft
from multigraft import (
    AdapterNameError,
    ConfigError,
    MultigraftWarning,
    PeftModel,
    UnsupportedError,
    convert_to_lora,
    save_as_lora,
)
from tests.laws import fingerprint
from tests.oracle import Net, build, graft_pair, inputs, our_config, output, quiet
from tests.oracle import random_state as random_values

MATRICES = ["lin0", "turned", "lin1"]
SHARED: dict[str, dict[str, Any]] = {
    "loha": {"kind": "LoHaConfig", "target_modules": ["lin0", "lin1"], "r": 2, "alpha": 3},
    "lokr": {"kind": "LoKrConfig", "target_modules": ["lin0", "lin1"], "r": 2, "alpha": 3},
    "vera": {"kind": "VeraConfig", "target_modules": MATRICES, "r": 4},
    "lora": {"target_modules": MATRICES, "r": 4, "lora_alpha": 6},
}
"""What PEFT converts too."""
OWN: dict[str, dict[str, Any]] = {
    "hira": {"kind": "HiraConfig", "target_modules": MATRICES, "r": 2},
    "adalora": {"kind": "AdaLoraConfig", "target_modules": MATRICES, "init_r": 4, "total_step": 9},
    "oft": {"kind": "OFTConfig", "target_modules": ["lin0"], "r": 0, "oft_block_size": 4},
    "ia3": {
        "kind": "IA3Config",
        "target_modules": [*MATRICES, "conv1"],
        "feedforward_modules": ["turned"],
    },
    "dora": {"target_modules": [*MATRICES, "emb", "conv1"], "use_dora": True},
    "rslora": {"target_modules": [*MATRICES, "emb", "conv1", "conv3"], "use_rslora": True},
    "lora with a bias": {"target_modules": MATRICES, "lora_bias": True},
    "pissa": {"target_modules": ["lin0"], "init_lora_weights": "pissa"},
    "grouped": {"target_modules": ["conv2"], "r": 4},
    "only tokens": {
        "kind": "TrainableTokensConfig",
        "target_modules": ["emb"],
        "token_indices": [3, 4, 5, 6],
    },
    "saved modules": {"target_modules": ["lin0"], "modules_to_save": ["head", "norm"]},
    "trained biases": {"target_modules": ["lin0"], "bias": "all"},
    "tokens": {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 5]}},
}


def filled(options: dict[str, Any], name: str = "default") -> Any:
    """Our model with a random adapter of this config."""
    model = multigraft.get_peft_model(build(Net), our_config(options), name)
    state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
    multigraft.set_peft_model_state_dict(model, random_values(state, 3), name)
    return model.eval()


def converted(model: Any, rank: float) -> tuple[Any, dict[str, torch.Tensor]]:
    with quiet():
        return convert_to_lora(model, rank)


def changes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: state[key.replace("lora_A", "lora_B")].flatten(1) @ value.flatten(1)
        for key, value in state.items()
        if "lora_A" in key
    }


@pytest.mark.parametrize("rank", [2, 0.7, 1.0])
@pytest.mark.parametrize("name", SHARED)
def test_pairs_are_pefts(name: str, rank: float) -> None:
    made = graft_pair(Net, SHARED[name])
    config, state = converted(made.ours, rank)
    with quiet():
        their_config, theirs = peft.convert_to_lora(made.theirs, rank)
    if rank == 1.0:  # all that is not zero: how much rounding leaves differs
        theirs = {key: theirs[key] for key in state}
    else:
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}
        assert set(config.target_modules) == set(their_config.target_modules)
    for key, value in changes(state).items():
        torch.testing.assert_close(value, changes(theirs)[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHARED | OWN)
def test_the_whole_energy_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Loaded by either library onto a fresh base."""
    model = filled((SHARED | OWN)[name])
    batch = inputs(model)
    expected = output(model, batch)
    assert not torch.allclose(expected, output(build(Net), batch), atol=1e-2)
    with quiet():
        save_as_lora(tmp_path, model, 1.0)
        theirs = peft.PeftModel.from_pretrained(build(Net), tmp_path).eval()
    ours = PeftModel.from_pretrained(build(Net), tmp_path).eval()
    for loaded in (ours, theirs):
        torch.testing.assert_close(output(loaded, batch), expected, atol=1e-4, rtol=1e-3)
    assert str(ours.peft_config["default"].peft_type) == "LORA"


@pytest.mark.parametrize("name", ["loha", "lora", "oft", "dora"])
def test_what_is_kept_holds_the_energy(name: str) -> None:
    model = filled((SHARED | OWN)[name])
    small, whole = (changes(converted(model, share)[1]) for share in (0.7, 1.0))
    assert small
    for key, change in small.items():
        left = (whole[key] - change).square().sum() / whole[key].square().sum()
        assert 0 <= float(left) <= 0.3 + 1e-5


def test_a_merged_adapter_is_converted_as_it_is() -> None:
    for options in (SHARED["loha"], OWN["ia3"], OWN["dora"]):
        model = filled(options)
        _, before = converted(model, 1.0)
        model.merge_adapter()
        _, after = converted(model, 1.0)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_model_stays_as_it_is() -> None:
    model = filled(SHARED["loha"])
    before = fingerprint(model)
    converted(model, 2)
    assert fingerprint(model) == before
    assert list(model.peft_config) == ["default"]


def test_a_model_adapted_in_place_has_keys_without_a_prefix() -> None:
    model = build(Net)
    multigraft.inject_adapter_in_model(our_config(SHARED["loha"]), model)
    _, state = converted(model, 1)
    assert set(state) == {f"{n}.lora_{f}.weight" for n in ("lin0", "lin1") for f in "AB"}


def test_one_of_several_adapters_is_converted() -> None:
    model = filled(SHARED["vera"], "other")
    model.add_adapter("loha", our_config(SHARED["loha"]))
    config, _ = convert_to_lora(model, 1, "loha")
    assert set(config.target_modules) == {"lin0", "lin1"}


def test_half_precision_adapters_are_decomposed_in_float32() -> None:
    made = graft_pair(Net, SHARED["loha"], dtype=torch.bfloat16)
    half = multigraft.get_peft_model(
        build(Net).bfloat16(), our_config(SHARED["loha"]), autocast_adapter_dtype=False
    )
    state = multigraft.get_peft_model_state_dict(made.ours)
    multigraft.set_peft_model_state_dict(half, state)
    _, found = converted(half, 4)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def test_the_bar_and_the_compiler_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = filled(SHARED["loha"])
    _, plain = converted(model, 2)
    _, shown = convert_to_lora(model, 2, progressbar=True, compile_kwargs={"backend": "eager"})
    assert all(torch.equal(plain[key], shown[key]) for key in plain)
    assert "Converting to LoRA" in capsys.readouterr().err


def test_a_lora_is_converted_with_a_word() -> None:
    with pytest.warns(MultigraftWarning, match=r"is a LoRA already. compress_adapter\(\)"):
        convert_to_lora(filled(SHARED["lora"]), 2)


def test_a_model_says_whether_an_adapter_can_be_converted() -> None:
    model = filled(SHARED["loha"])
    model.add_adapter("norms", our_config({"kind": "LNTuningConfig", "target_modules": ["norm"]}))
    assert model.supports_lora_conversion()
    assert not model.supports_lora_conversion("norms")
    with pytest.raises(AdapterNameError, match="no adapter is called `other`"):
        model.supports_lora_conversion("other")


@pytest.mark.parametrize(
    ("options", "rank", "error", "text"),
    [
        (SHARED["loha"], 0, ConfigError, r"`rank` \(=0\) must be an integer of at least 1"),
        (SHARED["loha"], 1.5, ConfigError, "a float above 0 and at most 1"),
        (SHARED["loha"], 17, ConfigError, r"`rank` \(=17\) must be at most 16, the smaller side"),
        ({"kind": "LNTuningConfig", "target_modules": ["norm"]}, 2, UnsupportedError, "no change"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], rank: float, error: type[Exception], text: str
) -> None:
    model = filled(options)
    with pytest.raises(error, match=text):
        convert_to_lora(model, rank)
    with pytest.raises(AdapterNameError, match="no adapter is called `other`"):
        convert_to_lora(model, 1, "other")
