"""LoRA-GA with data: gradients, every direction and scale, and PEFT beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig as TheirConfig
from peft.tuners.lora.loraga import preprocess_loraga as their_preprocess
from torch import Tensor, nn

from multigraft import (
    CheckpointError,
    ConfigError,
    DataError,
    LoraConfig,
    LoraGAConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    TargetError,
    UnsupportedError,
    get_peft_model,
    preprocess_loraga,
)
from multigraft.initialisations.lora_ga import DIRECTIONS, SCALES
from tests.initialisations.nets import batch, factors, net, off, options, train
from tests.laws import fingerprint
from tests.oracle import quiet

MORE: dict[str, Any] = {"rank_pattern": {"second": 3}}


def steps(base: nn.Module) -> None:
    """A few backward passes; their gradients add up."""
    for seed in range(3):
        base(batch(40, seed)).square().sum().backward()


def mine(base: nn.Module | None = None, **ga: Any) -> Any:
    base = net() if base is None else base
    config = LoraConfig(**options("lora_ga", **MORE), lora_ga_config=LoraGAConfig(**ga))
    preprocess_loraga(base, config, lambda: steps(base))
    return get_peft_model(base, config).eval()


def theirs(**ga: Any) -> Any:
    base = net()
    config = peft.LoraConfig(**options("lora_ga", **MORE), lora_ga_config=TheirConfig(**ga))
    with quiet():
        their_preprocess(base, config, lambda: steps(base))
        return peft.get_peft_model(base, config).eval()


def gradient(path: str) -> Tensor:
    base = net()
    base.get_submodule(path).weight.requires_grad_()
    steps(base)
    return base.get_submodule(path).weight.grad / 3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_it_begins_where_pefts_does_up_to_signs(direction: str, scale: str) -> None:
    """Which of ±u, ±v a random decomposition gives is chance; in PEFT too."""
    model, other = (make(direction=direction, scale=scale) for make in (mine, theirs))
    assert torch.equal(model(batch()), net()(batch()))
    for path in ("first", "second"):
        (A, B), (A2, B2) = factors(model, path), factors(other, path)
        assert off(A.abs(), A2.abs()) < 1e-3
        # The weight's own largest singular value is a random estimate as well.
        assert off(B.abs(), B2.abs()) < (0.2 if scale == "weight_svd" else 1e-3)


def test_a_random_direction_gives_both_factors_the_same_half() -> None:
    A, B = factors(mine(direction="random", scale="unit"), "first")
    U, S, Vh = torch.linalg.svd(gradient("first"))
    chosen = (A @ Vh[:8].T).abs().argmax(1)
    assert len(set(chosen.tolist())) == 4
    assert off(B.abs(), (U[:, chosen] * S[chosen]).abs()) < 1e-3


def test_trained_outputs_are_those_of_the_pair_less_where_it_began() -> None:
    model = mine()
    start = {path: factors(model, path) for path in ("first", "second")}
    start = {path: (A.clone(), B.clone()) for path, (A, B) in start.items()}
    train(model)
    base = net()
    for path, (A0, B0) in start.items():
        A, B = factors(model, path)
        scale = model.get_base_model().get_submodule(path).scaling["default"]
        base.get_submodule(path).weight += scale * (B @ A - B0 @ A0)
    assert off(model(batch()), base(batch())) < 1e-5


def test_gradients_modes_and_flags_of_the_model_are_as_before() -> None:
    base = net()
    base.first.weight.requires_grad_()
    base.first.weight.grad = torch.ones_like(base.first.weight)
    base.second.train()
    before = fingerprint(base)
    config = LoraConfig(**options("lora_ga"))
    preprocess_loraga(base, config, lambda: steps(base))
    assert fingerprint(base) == before
    assert torch.equal(base.first.weight.grad, torch.ones_like(base.first.weight))


def test_a_file_of_either_library_does_in_the_place_of_data(tmp_path: Path) -> None:
    expected = mine()
    config = LoraConfig(**options("lora_ga", **MORE))
    base = net()
    preprocess_loraga(base, config, lambda: steps(base), cache_file=str(tmp_path / "a" / "ours"))
    other = net()
    with quiet():
        their_preprocess(
            other,
            peft.LoraConfig(**options("lora_ga", **MORE), lora_ga_config=TheirConfig()),
            lambda: steps(other),
            cache_file=str(tmp_path / "b" / "theirs"),
        )
    for path in ("a/ours", "b/theirs"):
        fresh = net()
        preprocess_loraga(fresh, config, pytest.fail, cache_file=str(tmp_path / path))
        model = get_peft_model(fresh, config)
        assert off(factors(model, "first")[1].abs(), factors(expected, "first")[1].abs()) < 1e-3


def test_pefts_file_is_read_as_peft_reads_it_with_a_warning(tmp_path: Path) -> None:
    train(theirs()).save_pretrained(tmp_path)
    with pytest.warns(MultigraftWarning, match="does not hold what LoRA-GA took out"):
        model = PeftModel.from_pretrained(net(), tmp_path).eval()
    with quiet():
        read = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    assert off(model(batch()), read(batch())) < 1e-5


def test_without_gradients_a_new_adapter_is_refused_and_the_base_untouched() -> None:
    base = net()
    before = fingerprint(base)
    with pytest.raises(StateError, match=r"Call preprocess_loraga\(model, config, train_step\)"):
        get_peft_model(base, LoraConfig(**options("lora_ga")))
    assert fingerprint(base) == before


def test_a_smaller_rank_than_was_looked_for_is_served_and_a_larger_one_refused() -> None:
    base, config = net(), LoraConfig(**options("lora_ga"))
    preprocess_loraga(base, config, lambda: steps(base))
    get_peft_model(base, LoraConfig(**options("lora_ga", r=2)))
    with pytest.raises(StateError, match="rank 5 needs gradients, and those for rank 4 are known"):
        get_peft_model(base, LoraConfig(**options("lora_ga", r=5)), "larger")


def test_what_gives_no_gradient_is_refused() -> None:
    config = LoraConfig(**options("lora_ga"))
    with pytest.raises(DataError, match="first got no gradient"):
        preprocess_loraga(net(), config, lambda: None)
    base = net()
    with pytest.raises(DataError, match="first got NaN or infinity as gradient"):
        preprocess_loraga(base, config, lambda: (base(batch()) * torch.nan).sum().backward())
    with pytest.raises(ConfigError, match='LoraConfig with init_lora_weights="lora_ga"'):
        preprocess_loraga(net(), LoraConfig(**options(True)), lambda: None)


def test_quantised_layers_are_refused_before_anything_is_run() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear8bitLt(16, 8, has_fp16_weights=False)).to("cpu")
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga")
    with pytest.raises(UnsupportedError, match="0 is quantised or computes its weight"):
        preprocess_loraga(base, config, pytest.fail)


def test_the_rank_is_held_to_half_the_layers_smaller_size() -> None:
    with pytest.raises(TargetError, match=r"first: the rank \(=7\) must be at most 6, half"):
        get_peft_model(net(), LoraConfig(**options("lora_ga", r=7)))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    base, config = net(), LoraConfig(**options("lora_ga"))
    preprocess_loraga(base, config, lambda: steps(base), cache_file=str(tmp_path / "file"))
    other = nn.ModuleDict({"first": nn.Linear(9, 9), "second": nn.Linear(12, 20)})
    with pytest.raises(CheckpointError, match=r"`first._peft_loraga_grad` is of shape \(12, 16\)"):
        preprocess_loraga(other, config, pytest.fail, cache_file=str(tmp_path / "file"))


@pytest.mark.parametrize("bad", [{"direction": "ArBR"}, {"scale": "stabel"}, {"stable_gamma": 0}])
def test_options_that_mean_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(bad))}`"):
        LoraGAConfig(**bad)


def test_every_direction_and_scale_of_peft_is_here() -> None:
    hints = TheirConfig.__annotations__
    assert all(repr(name) in str(hints["direction"]) for name in DIRECTIONS)
    assert all(repr(name) in str(hints["scale"]) for name in SCALES)
