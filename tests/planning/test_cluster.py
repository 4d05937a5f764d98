"""Plans for many GPUs: what grows, what shrinks, and what is called an estimate."""

from __future__ import annotations

import pytest

from multigraft import LoraConfig
from multigraft.errors import ConfigError, UnsupportedError
from multigraft.planning import as_rows, cluster_table, clusters, notes
from multigraft.planning.cluster import operations

transformers = pytest.importorskip("transformers")

ALL = LoraConfig(r=4, target_modules="all-linear")
MANY = [2**power for power in range(11)]


@pytest.fixture(scope="module")
def config():
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=256,
    )


def planned(config, strategy="fsdp", gpus=MANY, **options):
    return list(clusters(config, ALL, gpus=gpus, strategy=strategy, max_length=64, **options))


def test_a_divided_base_takes_less_of_each_gpu_and_one_that_is_not_does_not(config):
    divided = [plan.of_rank.parts["base weights"] for plan in planned(config)]
    assert divided == sorted(divided, reverse=True)
    assert divided[-1] < divided[0] / 8
    whole = planned(config, "ddp")
    assert len({plan.total for plan in whole}) == 1


def test_what_each_gpu_sends_goes_towards_the_whole_operand(config):
    one, *_, many = planned(config, "ddp")
    assert one.sent == 0
    assert many.sent == pytest.approx(2 * many.of_rank.traffic.all_reduce, rel=0.01)


def test_rows_are_each_gpus_own_but_for_tensor_parallelism(config):
    assert [plan.tokens for plan in planned(config, "fsdp", [1, 4])] == [512, 2048]
    assert [plan.tokens for plan in planned(config, "tp", [1, 4])] == [512, 512]


def test_accumulated_parts_gather_the_base_again_and_reduce_once(config):
    (once,), (thrice,) = (planned(config, gpus=[4], accumulate=n) for n in (1, 3))
    assert thrice.of_rank.traffic.all_gather == 3 * once.of_rank.traffic.all_gather
    assert thrice.of_rank.traffic.all_reduce == once.of_rank.traffic.all_reduce
    assert thrice.computing == pytest.approx(3 * once.computing)
    assert thrice.tokens == 3 * once.tokens


def test_seconds_follow_from_the_rates_that_are_given(config):
    (plan,) = planned(config, gpus=[8], link="1GB", speed="2T")
    assert plan.sending == plan.sent / 1e9
    assert plan.computing == plan.of_rank.plan.flops / 2e12
    quick, slow = plan.seconds
    assert quick == max(plan.sending, plan.computing)
    assert slow == plan.sending + plan.computing
    assert plan.tokens_per_second == (plan.tokens / slow, plan.tokens / quick)


def test_the_table_marks_what_fits_and_its_notes_say_what_is_an_estimate(config):
    weights = [plan.total for plan in planned(config, gpus=[1, 8])]
    plans = planned(config, gpus=[1, 8], memory=sum(weights) // 2)
    first, second = cluster_table(plans).splitlines()[1:]
    assert "✗" in first and "✓" in second
    assert "bytes are counted" in notes(plans[0])
    assert "Seconds are estimates, at 50 GB/s and 400 TFLOP/s" in notes(plans[0])
    assert "no test compares them" in notes(planned(config, "zero3", [2])[0])


def test_the_data_has_every_byte(config):
    (row,) = as_rows(planned(config, gpus=[4]))
    assert row["total"] >= sum(row["parts"].values())
    assert row["sent"] == (row["all_gather"] + 2 * row["all_reduce"]) * 3 // 4
    assert row["is_measured"] is True


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpus": [0]}, ConfigError, r"`gpus` \(=0\) must be an integer of at least 1"),
        ({"strategy": "fdsp"}, UnsupportedError, "strategy `fdsp` is unknown. Nearest: `fsdp`"),
        ({"link": "fast"}, ConfigError, r"`link` \(='fast'\)"),
        ({"speed": "fast"}, ConfigError, r"`speed` \(='fast'\)"),
    ],
)
def test_a_cluster_that_means_nothing_is_refused(config, options, error, message):
    with pytest.raises(error, match=message):
        planned(config, **options)


def test_operations_are_read_with_their_prefix():
    assert [operations(text) for text in ("400T", "400 TFLOP/s", "1.5P", 2e12, "7e11")] == [
        *(4e14, 4e14, 1.5e15, 2e12, 7e11),
    ]


SHAPES = {
    "8B": (4096, 14336, 32, 32, 8.0e9),
    "70B": (8192, 28672, 80, 64, 70.6e9),
    "405B": (16384, 53248, 126, 128, 405.8e9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_llamas_of_every_size_are_planned_over_1_to_1024_gpus(name):
    hidden, inner, layers, heads, parameters = SHAPES[name]
    large = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    options = {"batch_size": 1, "gradient_checkpointing": True, "memory": "80GiB"}
    plans = planned(large, **options)
    weights = [plan.of_rank.parts["base weights"] for plan in plans]
    assert plans[0].of_rank.plan.parameters == pytest.approx(parameters, rel=0.01)
    for plan, own in zip(plans, weights, strict=True):
        assert own == pytest.approx(2 * parameters / plan.gpus, rel=0.01)
        assert plan.of_rank.traffic.all_gather == pytest.approx(4 * parameters, rel=0.01)
    assert plans[-1].fits
