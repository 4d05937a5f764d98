"""A LoRA of a lower rank: the nearest there is, layer by layer, in a file that PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from multigraft import AdapterNameError, ConfigError, LoraConfig, PeftModel, UnsupportedError
from multigraft.combine.ranks import enough, left_out, patterns
from tests.combine.nets import IDS, base, deltas, options, ours, state
from tests.combine.test_exact_sums import LAYERS, fill, grafted, output, products
from tests.laws import fingerprint
from tests.oracle import quiet


def steep(model: Any, adapter: str = "a") -> None:
    """Make singular values fall differently at each layer, so that ranks by energy differ."""
    with torch.no_grad():
        for index, (_, graft) in enumerate(model.roster.grafts(adapter)):
            A = graft.params[graft.method.geometry.factors[0]]
            fall = (0.3 + 0.1 * index) ** torch.arange(len(A), dtype=A.dtype)
            A.mul_(fall.reshape(-1, *(1,) * (A.dim() - 1)))


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "grouped"])
@pytest.mark.parametrize("rank", [2, 0.8])
def test_it_is_the_best_of_its_rank(name: str, rank: float) -> None:
    model, _ = grafted(name, 4)
    (report,) = model.compress_adapter("a", "small", rank)
    (dense,), (cut,) = products(model, {"a": 1.0}), products(model, {"small": 1.0})
    values = torch.linalg.svdvals(dense)
    left = values[:, report.rank :].square().sum()
    torch.testing.assert_close((dense - cut).square().sum(), left)
    assert report.error == pytest.approx(float((left / values.square().sum()).sqrt()))
    if isinstance(rank, float):
        assert (
            1 - report.error**2
            >= rank
            > 1 - float(values[:, report.rank - 1 :].square().sum() / values.square().sum())
        )
    else:
        assert report.rank == rank


def test_a_grouped_convolution_keeps_a_multiple_of_its_groups() -> None:
    model, x = grafted("grouped", 4)
    (report,) = model.compress_adapter("a", "small", 1.0)
    assert report.rank == 4
    torch.testing.assert_close(output(model, x, "small"), output(model, x, "a"))


def test_ranks_differ_by_layer_where_the_energy_does() -> None:
    model = ours(options())
    steep(model)
    reports = model.compress_adapter("a", "small", 0.999)
    ranks = {layer.path: layer.r["small"] for layer in model.base_model.layers()}
    assert {r.path: r.rank for r in reports} == ranks
    assert len(set(ranks.values())) > 1
    config = model.peft_config["small"]
    assert config.rank_pattern == config.alpha_pattern != {}
    assert {layer.scaling["small"] for layer in model.base_model.layers()} == {1.0}


@pytest.mark.parametrize("rank", [2, 0.999])
def test_peft_loads_the_file_to_the_same_outputs(rank: float, tmp_path: Path) -> None:
    model = ours(options(use_rslora=True, alpha_pattern={"conv": 9}))
    steep(model)
    model.compress_adapter("a", "small", rank)
    model.save_pretrained(tmp_path, selected_adapters=["small"])
    model.set_adapter("small")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "small").eval()
    torch.testing.assert_close(model(IDS), theirs(IDS), atol=2e-6, rtol=1e-4)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "small").eval()
    assert torch.equal(model(IDS), loaded(IDS))


@pytest.mark.parametrize(
    "case", [{"use_dora": True}, {"modules_to_save": ["head"]}, {"bias": "all"}]
)
def test_whatever_else_it_has_is_kept(case: dict[str, Any]) -> None:
    model = ours(options(**case))
    expected = model(IDS)
    model.compress_adapter("a", "same", 1.0)
    model.set_adapter("same")
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-4)
    extra = {k for k in state(model, "a") if "lora_A" not in k and "lora_B" not in k}
    assert extra <= state(model, "same").keys()


def test_the_source_and_what_is_active_stay() -> None:
    model = ours(options())
    before, own = model(IDS), state(model, "a")
    model.compress_adapter("a", "small", 1)
    assert model.active_adapters == ["a"]
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(own[k], v) for k, v in state(model, "a").items())
    assert not any(p.requires_grad for p in model.roster.parameters("small"))


def test_an_adapter_that_does_nothing_has_rank_one() -> None:
    model = PeftModel(base(), LoraConfig(target_modules=["lin"], r=4), "a")
    (report,) = model.compress_adapter("a", "small", 0.9)
    assert (report.path, report.rank, report.error) == ("lin", 1, 0.0)


def test_combinations_can_be_cut_by_energy_too() -> None:
    model = ours(options(), options(lora_alpha=10))
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", "svd", svd_rank=0.9)
    for path, total in deltas(model, "sum").items():
        exact = 0.7 * deltas(model, "a")[path] - 0.4 * deltas(model, "b")[path]
        assert 0 < float((total - exact).norm() / exact.norm()) <= 0.1**0.5


def test_paths_that_end_alike_keep_their_own_ranks() -> None:
    """A pattern that is a path also means every longer path that ends like it."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6)
            self.block = nn.Module()
            self.block.up = nn.Linear(6, 6)
            self.last = nn.Linear(6, 6)

    model = PeftModel(Nested(), LoraConfig(target_modules=["up", "last"], r=4), "a")
    fill(model, "a", 0)
    with torch.no_grad():
        model.get_base_model().up.lora_A["a"].weight[1:] = 0
    model.compress_adapter("a", "small", 1.0)
    ranks = {layer.path: layer.r["small"] for layer in model.base_model.layers()}
    assert ranks == {"up": 1, "block.up": 4, "last": 4}


@pytest.mark.parametrize(
    ("error", "arguments", "text"),
    [
        (ConfigError, ("a", "small", 0), "`rank` (=0) must be an integer of at least 1"),
        (ConfigError, ("a", "small", 1.5), "a float above 0 and at most 1"),
        (ConfigError, ("a", "small", True), "(=True) must be"),
        (AdapterNameError, ("a", "a", 1), "adapter `a` exists"),
        (AdapterNameError, ("c", "small", 1), "no adapter is called `c`"),
        (UnsupportedError, ("vera", "small", 1), "`vera` is a VERA; only LoRA"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    error: type[Exception], arguments: Any, text: str
) -> None:
    import re

    from multigraft import VeraConfig

    model = ours(options())
    model.add_adapter("vera", VeraConfig(target_modules=["lin"]))
    before = fingerprint(model)
    with pytest.raises(error, match=re.escape(text)):
        model.compress_adapter(*arguments)
    assert fingerprint(model) == before


def test_the_least_rank_that_holds_the_energy_is_chosen() -> None:
    values = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    assert [enough(values, share) for share in (0.5, 8 / 9, 0.9, 1.0)] == [1, 1, 2, 2]
    assert enough(values, 7) == 3
    assert left_out(values, 1) == pytest.approx((1 / 9) ** 0.5)
    assert left_out(torch.zeros(1, 3), 1) == 0


def test_the_commonest_rank_is_the_configs_own() -> None:
    ranks = {"a.x": 2, "b.x": 2, "c": 3, "c.c": 2}
    assert patterns(ranks, ranks) == (2, {"^c": 3})
