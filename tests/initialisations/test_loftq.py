"""LoftQ on a base that is not quantised: PEFT's values, and a base that stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multigraft import (
    ConfigError,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    TargetError,
    UnsupportedError,
    get_peft_model,
)
from tests.initialisations.nets import batch, factors, net, off, options, ours, theirs, train
from tests.initialisations.on_cpu import without_a_gpu

CASES = [(bits, count) for bits in (4, 8) for count in (1, 3)]


def loftq(bits: int = 4, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"loftq_config": {"loftq_bits": bits, "loftq_iter": count}, "lora_alpha": 4} | more


def wide() -> nn.Sequential:
    """Rows of whole blocks: of others bitsandbytes' own reading on CPUs is wrong."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 8)
    return nn.Sequential(*layers).requires_grad_(False).eval()


def x() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def quantised(model: Any, path: str) -> Tensor:
    """The weight that a layer runs with."""
    graft = next(g for layer, g in model.roster.grafts("default") if layer.path == path)
    return graft.method.start.quantised(graft.method, graft.params)


@pytest.mark.parametrize(("bits", "count"), CASES)
def test_weights_and_factors_are_pefts(
    bits: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_gpu(monkeypatch)
    given = loftq(bits, count, target_modules=["0", "4"])
    mine, other = ours("loftq", wide(), **given), theirs("loftq", wide(), **given)
    for path in ("0", "4"):
        their_base = other.get_base_model().get_submodule(path).base_layer.weight
        torch.testing.assert_close(quantised(mine, path), their_base, atol=1e-5, rtol=0)
        (A, B), (A2, B2) = factors(mine, path), factors(other, path)
        assert off(B @ A, B2 @ A2) < 1e-4
    train(mine), train(other)
    assert off(mine(x()), other(x())) < 1e-4


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("alpha", [2, 4, 16])
def test_factors_make_up_for_the_loss_whatever_the_scaling(bits: int, alpha: int) -> None:
    """PEFT does not divide by the scaling, so its B A is right where that is 1 alone."""
    model = ours("loftq", **loftq(bits, 1, lora_alpha=alpha))
    W, Q = net().first.weight, quantised(model, "first")
    A, B = factors(model, "first")
    U, S, Vh = torch.linalg.svd(W - Q)
    assert off(alpha / 4 * B @ A, U[:, :4] * S[:4] @ Vh[:4]) < 1e-4
    assert (W - Q - alpha / 4 * B @ A).norm() < (W - Q).norm()


def test_conv1d_is_served_which_peft_cannot() -> None:
    model = ours("loftq", net(turned=True), **loftq(4, 2))
    W = model.get_base_model().first.base_layer.weight
    Q = quantised(model, "first")
    A, B = factors(model, "first")
    assert Q.shape == W.shape
    assert (W - Q - (B @ A).T).norm() < (W - Q).norm()


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_holds_no_codes_and_gives_the_very_adapter_back(count: int, tmp_path: Path) -> None:
    model = train(ours("loftq", **loftq(4, count)))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == (4 if count == 1 else 8)
    assert not [key for key in keys if "quantised" in key]
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(quantised(again, "first"), quantised(model, "first"))
    assert torch.equal(again(batch()), model(batch()))


def test_pefts_file_gives_pefts_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_gpu(monkeypatch)
    other = train(theirs("loftq", wide(), **loftq(4, 3, target_modules=["0", "4"])))
    other.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(wide(), tmp_path).eval()
    assert off(again(x()), other(x())) < 1e-4
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert again.peft_config["default"].to_dict()["loftq_config"] == saved["loftq_config"]


def test_merging_is_rounding_to_what_the_quantised_base_will_hold() -> None:
    model = ours("loftq", **loftq(4, 1))
    Q, (A, B) = quantised(model, "first"), factors(model, "first")
    merged = model.merge_and_unload().first.weight
    torch.testing.assert_close(merged, Q + B @ A, atol=1e-6, rtol=0)


def test_dropout_drops_what_the_pair_sees_and_not_what_the_layer_sees() -> None:
    model = ours("loftq", **loftq(4, 1, lora_dropout=0.999)).train()
    base = net()
    with torch.no_grad():
        for path in ("first", "second"):
            base.get_submodule(path).weight.copy_(quantised(model, path))
        torch.manual_seed(0)
        found = torch.stack([model(batch()) for _ in range(3)])
    assert off(found.median(0).values, base(batch())) < 1e-5


def test_a_base_that_is_quantised_already_is_refused_with_what_to_call() -> None:
    base = nn.Sequential(bnb.nn.Linear4bit(64, 8, quant_type="nf4")).to("cpu")
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq")
    with pytest.raises(TargetError, match=r"quantised already.*replace_lora_weights_loftq\(\)"):
        get_peft_model(base, config)


@pytest.mark.parametrize(
    "bad", [{"loftq_bits": 3}, {"loftq_iter": 0}, {"loftq_iter": 1.5}, {"loftq_iter": True}]
)
def test_options_that_mean_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(bad))}`"):
        LoftQConfig(**bad)


def test_it_is_not_combined_with_dora_or_a_bias() -> None:
    with pytest.raises(UnsupportedError, match="`dora`, `loftq` cannot be combined"):
        get_peft_model(net(), LoraConfig(**options("loftq", use_dora=True)))
    with pytest.raises(TargetError, match="has no `lora_bias`; leave one of them out"):
        get_peft_model(net(), LoraConfig(**options("loftq", lora_bias=True)))


def test_both_spellings_of_its_config_are_read() -> None:
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(8, 2))
    table = LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 2})
    assert config.loftq_config == table.loftq_config
    assert LoraConfig(init_lora_weights="loftq").loftq_config == LoftQConfig()
