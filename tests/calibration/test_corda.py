"""CorDA with data: covariances, components, and PEFT beside it."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as TheirConfig
from torch import Tensor, nn

import multigraft
from multigraft import (
    CheckpointError,
    ConfigError,
    CordaConfig,
    DataError,
    LoraConfig,
    PeftModel,
    StateError,
    get_peft_model,
    preprocess_corda,
)
from tests.initialisations.nets import batch, factors, net, off, options, train
from tests.laws import fingerprint
from tests.oracle import quiet

DATA = [batch(30, seed)[None] for seed in range(4)]
MORE: dict[str, Any] = {"rank_pattern": {"second": 3}}


def mine(base: nn.Module | None = None, **corda: Any) -> Any:
    base = net() if base is None else base
    config = LoraConfig(**options("corda", **MORE), corda_config=CordaConfig(**corda))
    preprocess_corda(base, config, lambda: [base(x) for x in DATA])
    return get_peft_model(base, config).eval()


def theirs(monkeypatch: pytest.MonkeyPatch, **corda: Any) -> Any:
    """PEFT's, whose module imports ``attr`` for what the standard library has too."""
    stand_in = types.ModuleType("attr")
    stand_in.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    from peft.tuners.lora.corda import preprocess_corda as preprocess

    base = net()
    config = peft.LoraConfig(**options("corda", **MORE), corda_config=TheirConfig(**corda))
    with quiet():
        preprocess(base, config, lambda: [base(x) for x in DATA])
        return peft.get_peft_model(base, config).eval()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_it_begins_where_pefts_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = mine(corda_method=method), theirs(monkeypatch, corda_method=method)
    for path in ("first", "second"):
        (A, B), (A2, B2) = factors(model, path), factors(other, path)
        assert off(B @ A, B2 @ A2) < 1e-4
    assert torch.equal(model(batch()), net()(batch()))
    train(model), train(other)
    assert off(model(batch()), other(batch())) < 1e-4


@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_files_of_either_library_do_in_the_place_of_data(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = tmp_path / "a" / "ours.pt", tmp_path / "b" / "theirs.pt"
    expected = mine(**{kind: str(ours)})
    theirs(monkeypatch, **{kind: str(other)})
    found = [torch.load(path, weights_only=True) for path in (ours, other)]
    assert found[0].keys() == found[1].keys()
    assert all(off(found[0][key].abs(), found[1][key].abs()) < 1e-4 for key in found[0])
    for path in (ours, other):
        base = net()
        config = LoraConfig(**options("corda", **MORE), corda_config={kind: str(path)})
        preprocess_corda(base, config)
        model = get_peft_model(base, config).eval()
        assert off(factors(model, "first")[1].abs(), factors(expected, "first")[1].abs()) < 1e-4


def test_the_model_is_as_before_and_does_not_know() -> None:
    base = net().train()
    base.second.eval()
    before = fingerprint(base)
    config = LoraConfig(**options("corda"))
    preprocess_corda(base, config, lambda: base(DATA[0]))
    assert fingerprint(base) == before


def test_data_may_be_run_through_a_model_of_the_same_layers() -> None:
    base, runs = net(), net()
    config = LoraConfig(**options("corda"))
    preprocess_corda(base, config, lambda: [runs(x) for x in DATA], hooked_model=runs)
    direct = net()
    preprocess_corda(direct, config, lambda: [direct(x) for x in DATA])
    models = [get_peft_model(m, config).eval() for m in (base, direct)]
    assert torch.equal(factors(models[0], "first")[0], factors(models[1], "first")[0])


def test_batches_of_several_rows_count_as_one_long_one() -> None:
    together = torch.cat(DATA, dim=1)
    found = []
    for x in (together, together.reshape(4, 30, 16)):
        base, config = net(), LoraConfig(**options("corda"))
        preprocess_corda(base, config, lambda x=x, base=base: base(x))  # type: ignore[misc]
        found.append(factors(get_peft_model(base, config), "first")[0])
    assert off(found[0], found[1]) < 1e-4


def test_several_adapters_begin_from_the_same_data() -> None:
    base, config = net(), LoraConfig(**options("corda"))
    preprocess_corda(base, config, lambda: base(DATA[0]))
    model = get_peft_model(base, config)
    model.add_adapter("other", config)
    for path in ("first", "second"):
        assert torch.equal(factors(model, path)[0], factors(model, path, "other")[0])


def test_an_adapter_beside_others_begins_where_one_on_the_base_does() -> None:
    config = LoraConfig(**options("corda"))
    model = get_peft_model(net(), LoraConfig(**options(True)), "other").eval()
    preprocess_corda(model, config, lambda: [model(x) for x in DATA])
    model.add_adapter("default", config)
    alone = net()
    preprocess_corda(alone, config, lambda: [alone(x) for x in DATA])
    expected = factors(get_peft_model(alone, config), "first")
    assert all(torch.equal(a, b) for a, b in zip(factors(model, "first"), expected, strict=True))


def test_pefts_file_needs_the_data_and_gives_its_output_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train(theirs(monkeypatch))
    other.save_pretrained(tmp_path)
    base = net()
    before = fingerprint(base)
    with pytest.raises(StateError, match=r"first: .* needs data, and nothing is known"):
        PeftModel.from_pretrained(base, tmp_path)
    assert fingerprint(base) == before
    config = LoraConfig(**options("corda", **MORE))
    preprocess_corda(base, config, lambda: [base(x) for x in DATA])
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    assert off(model(batch()), other(batch())) < 1e-4


def test_without_data_a_new_adapter_is_refused_and_the_base_untouched() -> None:
    base = net()
    before = fingerprint(base)
    with pytest.raises(StateError, match=r"Call preprocess_corda\(model, config, run_model\)"):
        get_peft_model(base, LoraConfig(**options("corda")))
    assert fingerprint(base) == before


def test_data_for_another_rank_is_refused() -> None:
    base, config = net(), LoraConfig(**options("corda"))
    preprocess_corda(base, config, lambda: base(DATA[0]))
    with pytest.raises(StateError, match="with rank 5 needs data, and components of rank 4"):
        get_peft_model(base, LoraConfig(**options("corda", r=5)))


def shown(x: Tensor | None, base: nn.Module, **corda: Any) -> None:
    config = LoraConfig(**options("corda"), corda_config=CordaConfig(**corda))
    preprocess_corda(base, config, None if x is None else lambda: base(x))


def test_data_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input of first is zero, or holds NaN"):
        shown(torch.zeros(1, 5, 16), net())
    with pytest.raises(DataError, match="input of first is zero, or holds NaN"):
        shown(torch.full((1, 5, 16), torch.nan), net())
    with pytest.raises(ConfigError, match="give `run_model`"):
        shown(None, net())
    with pytest.raises(DataError, match="first, second did not run on the data"):
        preprocess_corda(net(), LoraConfig(**options("corda")), lambda: None)
    with pytest.raises(ConfigError, match='LoraConfig with init_lora_weights="corda"'):
        preprocess_corda(net(), LoraConfig(**options(True)), lambda: None)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    shown(DATA[0], net(), cache_file=str(path))
    config = LoraConfig(**options("corda", r=3), corda_config={"cache_file": str(path)})
    with pytest.raises(CheckpointError, match=r"`first.eigens.S_WC` is of shape \(4,\)"):
        preprocess_corda(net(), config)
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        preprocess_corda(net(), config)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`corda_method` \(='imp'\).* Nearest: `ipm`"):
        CordaConfig(corda_method="imp")


def test_the_config_comes_back_from_its_file(tmp_path: Path) -> None:
    mine(corda_method="kpm").save_pretrained(tmp_path)
    config = multigraft.PeftConfig.from_pretrained(tmp_path)
    assert config.corda_config == CordaConfig(corda_method="kpm")  # type: ignore[attr-defined]
    with quiet():
        read = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert read.corda_config.corda_method == "kpm"
