"""Requests that mean nothing are refused, and every kind of model that can be planned is."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from torch import nn

from multigraft import LoraConfig
from multigraft.errors import ConfigError, MultigraftError, TargetError, UnsupportedError
from multigraft.planning import as_text, bytes_of, plan

transformers = pytest.importorskip("transformers")

ALL = LoraConfig(r=4, target_modules="all-linear")


def tiny():
    return transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=64,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` \(=0\) must be an integer of at least 1"),
        ({"accumulate": True}, r"`accumulate` \(=True\)"),
        ({"max_length": 65}, r"`max_length` \(=65\) is more than the model takes \(64\)"),
        ({"dtype": "bflot16"}, r"`dtype` \(='bflot16'\) must be one of .* Nearest: `bfloat16`"),
        ({"device": "gpu"}, r"`device` \(='gpu'\) must be one of cuda, cpu"),
        ({"memory": "80 gigs"}, r"`memory` \(='80 gigs'\) must be a number above 0 with a unit"),
        ({"memory": 0}, r"`memory` \(=0\)"),
        ({"optimizer": "adamw8bits"}, r"adamw8bit"),
    ],
)
def test_a_value_outside_what_is_allowed_is_refused(options, message):
    with pytest.raises(MultigraftError, match=message):
        plan(tiny(), ALL, **{"max_length": 16, **options})


def test_an_adapter_that_does_not_fit_the_model_is_refused():
    with pytest.raises(TargetError, match="no module is called `q_prj`"):
        plan(tiny(), LoraConfig(target_modules=["q_prj"]), max_length=16)


def test_a_plan_needs_an_adapter_and_a_model():
    with pytest.raises(ConfigError, match="at least one adapter"):
        plan(tiny(), {}, max_length=16)
    with pytest.raises(ConfigError, match=r"`model` \(=int\)"):
        plan(7, ALL)


def test_a_model_that_cannot_be_checkpointed_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="Sequential does not support it"):
        plan(model, LoraConfig(target_modules=["0"]), gradient_checkpointing=True)


class Reader(nn.Module):
    """Its forward goes by values that are not there."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask):
        return self.proj(torch.tensor(input_ids.tolist(), dtype=torch.float32))


def test_a_model_that_reads_values_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="Reader: its forward cannot be run on tensors"):
        plan(Reader(), LoraConfig(target_modules=["proj"]))


def test_images_are_planned():
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        architectures=["ViTForImageClassification"],
    )
    config.architectures = ["ViTForImageClassification"]
    two, three, four = (plan(config, ALL, batch_size=rows).kept for rows in (2, 3, 4))
    assert four - three == three - two > two / 4


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_base_is_in_the_dtype_that_is_asked_for(dtype, size):
    found = plan(tiny(), ALL, max_length=16, batch_size=1, dtype=dtype)
    assert found.parts["base weights"] == pytest.approx(size * found.parameters, rel=0.02)


@pytest.mark.slow
def test_405_billion_parameters_take_seconds_and_no_memory():
    config = transformers.LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        max_position_embeddings=8192,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = plan(config, ALL, batch_size=1, max_length=2048)
    assert found.parameters == pytest.approx(405e9, rel=0.01)
    assert found.parts["base weights"] == pytest.approx(2 * found.parameters, rel=0.001)
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_sizes_are_read_and_written():
    assert bytes_of("80GiB") == 80 << 30
    assert bytes_of("1.5 gb") == 1_500_000_000
    assert bytes_of(123) == 123
    texts = [as_text(n) for n in (0, 900, 1536, 80 << 30, 123456789012345, -2048)]
    assert texts == ["0 B", "900 B", "1.50 KiB", "80.0 GiB", "112 TiB", "-2.00 KiB"]
