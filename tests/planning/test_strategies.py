"""A rank's bytes on paper are those that real ranks hold and send."""

from __future__ import annotations

import pytest
import torch

from multigraft.errors import ConfigError, UnsupportedError
from multigraft.planning.flops import flops_of
from multigraft.planning.request import Request
from multigraft.planning.strategies import STRATEGIES
from multigraft.planning.traffic import Traffic
from tests.planning import distribution_jobs as jobs

transformers = pytest.importorskip("transformers")

BOOKKEEPING = 64
"""Bytes of collectives in which ranks agree that they train the same."""
INPUTS = 1024
"""Bytes of buffers and the batch, which lie beside the base's weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two bases, one of sizes that nothing divides."""
    from tests.distributed.tiny import base

    even, odd = tmp_path_factory.mktemp("even"), tmp_path_factory.mktemp("odd")
    base(torch.float32).save_pretrained(even)
    base(torch.float32, vocab_size=67, intermediate_size=45).save_pretrained(odd)
    return {"even": str(even), "odd": str(odd)}


def planned(folder, strategy, ranks, rank=4, checkpointing=False):
    request = Request(
        folder,
        {"default": jobs.adapter(rank)},
        batch_size=jobs.ROWS,
        max_length=jobs.TOKENS,
        dtype="float32",
        device="cpu",
        gradient_checkpointing=checkpointing,
    )
    return STRATEGIES[strategy](request, ranks)


def sent(found, ranks):
    """Whole operands by kind; a functional all-gather tells its own part alone."""
    totals = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0)
    for name, size in found["sizes"]:
        totals[name] += size if size > BOOKKEEPING else 0
    return totals


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    ("strategy", "which"),
    [("ddp", "even"), ("ddp", "odd"), ("fsdp", "even"), ("fsdp", "odd"), ("tp", "even")],
)
def test_real_ranks_send_what_is_planned(world, folders, strategy, which, rank, checkpointing):
    found = world.run(jobs.step, folders[which], strategy, rank, checkpointing)[0]
    plan = planned(folders[which], strategy, world.size, rank, checkpointing)
    real = sent(found, world.size)
    if strategy == "tp":
        real["all_gather"] *= world.size
    assert Traffic(**real) == plan.traffic


@pytest.mark.parametrize(
    ("strategy", "which"), [("ddp", "odd"), ("fsdp", "even"), ("fsdp", "odd"), ("tp", "even")]
)
def test_real_ranks_hold_what_is_planned(world, folders, strategy, which):
    found = world.run(jobs.step, folders[which], strategy, 4, False)[0]
    plan = planned(folders[which], strategy, world.size)
    assert found["weights"] <= plan.parts["base weights"] <= found["weights"] + INPUTS
    assert plan.parts["adapters"] == found["trained"]


def test_ranks_share_the_work_of_a_step_divided_by_tensor_parallelism(folders):
    alone = planned(folders["even"], "ddp", 1).plan.flops
    parted = planned(folders["even"], "tp", 2).plan.flops
    assert alone / 2 < parted < 0.75 * alone  # the adapters' whole factors are worked on by both


def test_zero3_says_that_it_is_not_measured(folders):
    plan = planned(folders["even"], "zero3", 2)
    whole = planned(folders["even"], "ddp", 2)
    assert not plan.measured and whole.measured
    assert plan.parts["optimiser state"] == pytest.approx(whole.parts["optimiser state"] / 2, abs=1)
    assert plan.traffic.reduce_scatter == whole.traffic.all_reduce


@pytest.mark.parametrize("strategy", ["fsdp", "tp", "zero3"])
def test_a_quantised_base_is_not_divided(folders, strategy):
    request = Request(folders["even"], {"a": jobs.adapter()}, max_length=16, quantize="nf4")
    with pytest.raises(ConfigError, match=f"`strategy` {strategy} does not divide quantised"):
        STRATEGIES[strategy](request, 2)


def test_tensor_parallelism_refuses_what_it_cannot_divide(folders):
    with pytest.raises(ConfigError, match=r"`gpus` \(=3\) must divide"):
        planned(folders["even"], "tp", 3)
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    request = Request(bert, {"a": jobs.adapter()}, max_length=16)
    request = request.but(adapters={"a": jobs.LoraConfig(target_modules="all-linear")})
    with pytest.raises(UnsupportedError, match="has no `tp_plan`"):
        STRATEGIES["tp"](request, 2)


def test_products_and_attention_are_counted_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    from multigraft.planning.ledger import Ledger

    model = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 5), torch.nn.Linear(12, 7))
    x = torch.randn(2, 3, 16, requires_grad=True)
    with FlopCounterMode(display=False) as known, Ledger() as own:
        model(x).sum().backward()
    assert sum(own.flops) == known.get_total_flops() > 0
    q = torch.randn(2, 4, 16, 8, device="meta", requires_grad=True)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with Ledger() as own:
        fused(q, q, q)[0].sum().backward()
    one = 2 * 2 * 4 * 16 * 16 * 8  # of the two products forwards and five backwards
    assert sum(own.flops) == 7 * one
    assert flops_of(torch.ops.aten.relu.default, (x,), x) == 0
