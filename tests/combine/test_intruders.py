"""Intruder dimensions: PEFT's mitigation on linear layers, and the same law on the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as their_reduction

from multigraft import AdapterNameError, ConfigError, IA3Config, UnsupportedError
from multigraft.combine.intruders import reduce_intruder_dimension
from tests.combine.nets import deltas, options, ours
from tests.combine.test_exact_sums import LAYERS, grafted, products
from tests.laws import fingerprint
from tests.oracle import Net, Pair, graft_pair, llama, quiet, same_weights

CONFIG = {"target_modules": ["lin0", "lin1", "head"], "r": 4, "lora_alpha": 6}


def pair(std: float = 1.5, **more: Any) -> Pair:
    made = graft_pair(Net, {**CONFIG, **more})
    same_weights(made, std=std)
    return made


def reduced(made: Pair, **more: Any) -> tuple[list[str], list[str]]:
    lines: tuple[list[str], list[str]] = [], []
    reduce_intruder_dimension(made.ours, logging_sink=lines[0].append, **more)
    with quiet():
        their_reduction(made.theirs, logging_sink=lines[1].append, **more)
    return lines


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"top_k": 2},
        {"threshold_epsilon": 0.8},
        {"mitigation_lambda": 0.0},
        {"new_adapter_name": "other"},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"lin1": 2}}])
def test_updates_are_pefts(more: dict[str, Any], config: dict[str, Any]) -> None:
    made = pair(**config)
    before = deltas(made.ours, "default")
    own, theirs = reduced(made, **more)
    name = more.get("new_adapter_name", "intruder_reduced")
    after = deltas(made.ours, name)
    for path, delta in after.items():
        expected = made.theirs.base_model.model.get_submodule(path).get_delta_weight(name)
        torch.testing.assert_close(delta, expected.detach(), atol=1e-4, rtol=1e-4)
    assert any(not torch.allclose(before[path], after[path], atol=1e-2) for path in after)
    assert made.ours.active_adapters == made.theirs.active_adapters == [name]
    assert any("Intruders" in line for line in own)
    counts = [[re.findall(r"\d+$|No", line)[-1:] for line in lines[:-1]] for lines in (own, theirs)]
    assert counts[0] == counts[1]
    assert own[-1] == theirs[-1]


def test_factors_are_pefts_but_for_their_signs() -> None:
    made = pair()
    reduced(made)
    own = made.ours.base_model.model.lin0
    other = made.theirs.base_model.model.lin0
    name = "intruder_reduced"
    for group in ("lora_A", "lora_B"):
        a, b = (getattr(layer, group)[name].weight.detach().abs() for layer in (own, other))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_small_update_has_no_intruders_and_is_copied() -> None:
    made = pair(std=1e-3)
    lines, _ = reduced(made)
    assert all("No intruders" in line for line in lines[:-1])
    state = [made.ours.roster.grafts(name) for name in ("default", "intruder_reduced")]
    for (_, a), (_, b) in zip(*state, strict=True):
        assert all(torch.equal(a.params[n], b.params[n]) for n in a.params)


@pytest.mark.parametrize("std", [1.5, 1e-3])
def test_a_scale_that_was_set_is_carried(std: float) -> None:
    """In PEFT it is lost, since the new adapter has the config's."""
    plain, scaled = pair(std=std).ours, pair(std=std).ours
    with torch.no_grad():
        for _, graft in scaled.roster.grafts("default"):
            graft.params["lora_B.weight"].mul_(4)
    for layer in scaled.base_model.layers():
        layer.set_scale("default", 0.25)
    for model in (plain, scaled):
        reduce_intruder_dimension(model, logging_sink=None)
    for path, delta in deltas(plain, "intruder_reduced").items():
        own = deltas(scaled, "intruder_reduced")[path]
        torch.testing.assert_close(own, delta, atol=1e-5, rtol=1e-4)


def test_the_new_adapter_is_active_and_the_old_one_as_it_was() -> None:
    made = pair()
    own = deltas(made.ours, "default")
    reduce_intruder_dimension(made.ours, logging_sink=None)
    assert made.ours.active_adapters == ["intruder_reduced"]
    assert all(torch.equal(own[k], v) for k, v in deltas(made.ours, "default").items())


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "grouped"])
def test_intruders_lose_their_share_on_every_kind_of_layer(name: str) -> None:
    """With a rank to spare nothing is cut: the weight loses exactly (1 - λ) of each intruder."""
    model, _ = grafted(name, 1)
    model.add_weighted_adapter(["a"], [8.0], "wide", "svd", svd_rank=4)
    (before,) = products(model, {"wide": 1.0})
    reduce_intruder_dimension(
        model, "wide", "less", top_k=2, mitigation_lambda=0.25, logging_sink=None
    )
    (after,) = products(model, {"less": 1.0})
    (_, graft) = next(iter(model.roster.grafts("wide")))
    W = graft.method.geometry.as_matrices(graft.site.layer, graft.site.weight()).detach()
    expected, found = before.clone(), 0
    for index, own in enumerate(W):
        base, _, _ = torch.linalg.svd(own, full_matrices=False)
        u, s, vh = torch.linalg.svd(own + before[index], full_matrices=False)
        for k in range(2):
            if (u[:, k] @ base).abs().max() < 0.5:
                expected[index] -= 0.75 * s[k] * torch.outer(u[:, k], vh[k])
                found += 1
    torch.testing.assert_close(after, expected)
    assert found or torch.equal(after, before)


def test_what_else_the_adapter_has_is_kept() -> None:
    model = ours(options(modules_to_save=["head"], bias="all"))
    reduce_intruder_dimension(model, "a", "b", logging_sink=None)
    head = model.get_base_model().head
    assert torch.equal(head.modules_to_save["a"].weight, head.modules_to_save["b"].weight)


def test_half_precision_stays_and_is_computed_in_float32() -> None:
    made = graft_pair(llama, {"target_modules": ["q_proj"], "r": 4}, dtype=torch.bfloat16)
    reduce_intruder_dimension(made.ours, logging_sink=None)
    with quiet():
        their_reduction(made.theirs, logging_sink=None)
    names = made.ours.roster.parameters("intruder_reduced")
    assert {p.dtype for p in names} == {torch.float32}
    a, b = (x.float() for x in made.outputs())
    assert float((a - b).norm() / b.norm()) < 0.02


def test_lines_are_printed_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    reduce_intruder_dimension(pair().ours)
    assert capsys.readouterr().out.endswith("Enabling new adapter intruder_reduced\n")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"top_k": 0}, ConfigError, "`top_k` (=0) must be an integer of at least 1"),
        ({"threshold_epsilon": 2}, ConfigError, "`threshold_epsilon` (=2) must be at least 0"),
        ({"mitigation_lambda": -1}, ConfigError, "`mitigation_lambda` (=-1) must be"),
        ({"new_adapter_name": "default"}, AdapterNameError, "adapter `default` exists"),
        ({"old_adapter_name": "none"}, AdapterNameError, "no adapter is called `none`"),
        ({"old_adapter_name": "dora"}, UnsupportedError, "`dora` uses `dora`, whose effect"),
        ({"old_adapter_name": "ia3"}, UnsupportedError, "`ia3` is a IA3; only LoRA's"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    from multigraft import LoraConfig

    model = pair().ours
    model.add_adapter("ia3", IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    model.add_adapter("dora", LoraConfig(target_modules=["lin0"], use_dora=True))
    before = fingerprint(model)
    with pytest.raises(error, match=re.escape(text)):
        reduce_intruder_dimension(model, **arguments)
    assert fingerprint(model) == before
