"""Which modules a config means, and what they are called in memory, beside the real PEFT.

PEFT lets silly configs through (a name that matches nothing beside one that does, a full path that
`layers_to_transform` leaves out). Those are errors here, but files keep PEFT's meaning: reading
them is lenient. So each case is asked twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from multigraft import ConfigError, TargetError
from multigraft.tuner import Tuner
from tests import oracle
from tests.oracle import ARCHITECTURES, build, graft_pair, quiet

REFUSED = object()
"""What a library that refuses the config finds."""


def ours(maker: Callable[[], nn.Module], options: dict[str, Any], lenient: bool) -> Any:
    """The base paths that we adapt.

    Args:
        lenient: as when the config comes from a file.
    """
    model = build(maker)
    with quiet():
        try:
            Tuner(model).add_adapter("default", oracle.our_config(options), lenient=lenient)
        except (TargetError, ConfigError):
            return REFUSED
    return oracle.our_sites(model)


def theirs(maker: Callable[[], nn.Module], options: dict[str, Any]) -> Any:
    """The base paths that PEFT adapts."""
    with quiet():
        try:
            return oracle.peft_sites(peft.get_peft_model(build(maker), oracle.peft_config(options)))
        except (ValueError, TypeError):
            return REFUSED


def leaf_names(maker: Callable[[], nn.Module]) -> list[str]:
    return sorted({n.rpartition(".")[2] for n, _ in build(maker).named_modules() if n} - {"0", "1"})


def linear_paths(maker: Callable[[], nn.Module]) -> list[str]:
    return [n for n, m in build(maker).named_modules() if isinstance(m, nn.Linear)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """An architecture, and options whose names are its modules' names."""
    maker = draw(st.sampled_from([oracle.llama, oracle.bert_classifier, oracle.t5]))
    names = st.sampled_from(leaf_names(maker)) | st.sampled_from(linear_paths(maker))
    several = st.lists(names, min_size=1, max_size=3, unique=True)
    options: dict[str, Any] = {"target_modules": draw(st.just("all-linear") | st.none() | several)}
    if draw(st.booleans()):
        options |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    if draw(st.booleans()):
        options["exclude_modules"] = draw(several)
    if options["target_modules"] != "all-linear" and draw(st.booleans()):
        options["layers_to_transform"] = draw(st.sampled_from([0, [1], [0, 1]]))
    return maker, options


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_names_mean_the_same_modules(
    case: tuple[Callable[[], nn.Module], dict[str, Any]],
) -> None:
    expected = theirs(*case)
    assert ours(*case, lenient=True) == expected
    assert ours(*case, lenient=False) in (REFUSED, expected)


@pytest.mark.parametrize("maker", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": r".*(query|q_proj|c_attn|lin\d|SelfAttention\.q)"},
        {"target_modules": "all-linear", "exclude_modules": r".*(0|lin0).*"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": None},
        {"target_modules": ["nothing_of_that_name"]},
        {"target_modules": ["norm", "LayerNorm", "ln_1", "layer_norm", "input_layernorm"]},
    ],
    ids=str,
)
def test_these_options_mean_the_same_modules(
    maker: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    expected = theirs(maker, options)
    assert ours(maker, options, lenient=False) == expected
    assert ours(maker, options, lenient=True) == expected


STATES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "every layer kind": (oracle.Net, {"target_modules": oracle.KINDS, "r": 4}),
    "biases of B": (oracle.gpt2, {"target_modules": "all-linear", "lora_bias": True}),
    "magnitudes": (oracle.llama, {"target_modules": "all-linear", "use_dora": True}),
    "embedding, saved norm": (
        oracle.llama,
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["model.norm"]},
    ),
    "causal language model": (
        oracle.llama,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "classifier": (oracle.bert_classifier, {"task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize(("maker", "options"), STATES.values(), ids=STATES)
def test_names_in_memory_are_equal(maker: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    pair = graft_pair(maker, options, fill=False)
    oracle.add_to_both(pair, "second", options)

    def names(model: nn.Module, trainable: bool) -> list[str]:
        # The base's own module beside saved copies has our wrapper's usual name for it.
        return [
            n.replace(".original_module.", ".base_layer.")
            for n, p in model.named_parameters()
            if p.requires_grad or not trainable
        ]

    for trainable in (True, False):
        assert sorted(names(pair.ours, trainable)) == sorted(names(pair.theirs, trainable))
    assert all("default" in name.split(".") for name in names(pair.ours, trainable=True))
    keys = {n.replace(".original_module.", ".base_layer.") for n in pair.theirs.state_dict()}
    assert set(pair.ours.state_dict()) == keys
