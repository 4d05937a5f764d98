"""Expressions that could take for ever are told from those that cannot."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multigraft import ConfigError, LoHaConfig, LoraConfig, PeftConfig
from multigraft.expressions import slow

EXPONENTIAL = [
    "(a+)+b",
    "(a*)*b",
    "(a|aa)*b",
    "(a?b?)*c",
    "(.*)*x",
    r"(.*\.)*x",
    r"(\w+\w)*x",
    "((a|b)+c?)+d",
    "(?:[a-z_]+\\.?)+!",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(x+x+)+y",
    "(a|b|ab)*c",
    "(a{1,20})+b",
    "((a{0,3})b?)+c",
    "(?=(a+)+b)a",
]
POLYNOMIAL = [
    ".*.*.*.*x",
    "(.*a){9}x",
    r".*\w*.*\w*x",
    ".*_.*_.*_.*!",
    "(?!.*.*.*.*x)y",
    "(.*a)?(.*b)?(.*c)?(.*d)?x",
]
USUAL = [
    ".*",
    "[^.]*",
    r".*\.(q_proj|v_proj)",
    r"(.*\.)?up",
    r"(?:\w+\.)*q_proj",
    r"([a-z]+_)*proj",
    "(q|k|v)+",
    r"blocks\.\d\.(up|down)",
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
    r"layers\.([0-9]|[1-2][0-9]|3[0-1])\..*",
    "^(?!.*vision).*(q_proj|k_proj)$",
    "(?=.*a)(?=.*b)(?=.*c)(?=.*d).*",
    r"\w+\.\w+\.\w+\.\w+\.\d+\.\w+\.weight",
    ".*layers.*(attn|mlp).*proj.*",
    r".*language_model\..*\.(q_proj|v_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))",
]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_a_part_that_repeats_in_several_ways_is_found(pattern: str) -> None:
    assert slow(pattern) == "a repeated part of it can match the same text in several ways"


@pytest.mark.parametrize("pattern", POLYNOMIAL)
def test_many_loops_in_a_row_are_found(pattern: str) -> None:
    assert "loops in a row can match the same text" in (slow(pattern) or "")


@pytest.mark.parametrize("pattern", USUAL)
def test_what_configs_usually_hold_passes(pattern: str) -> None:
    assert slow(pattern) is None


def test_a_large_expression_is_decided_in_time() -> None:
    start = time.perf_counter()
    assert slow("|".join(rf"model\.layers\.{n}\.mlp\.up.*" for n in range(2000))) is None
    assert slow("(" + "|".join(f"module_{n}" for n in range(2000)) + ")*x") is not None
    assert time.perf_counter() - start < 5


expressions = st.recursive(
    st.sampled_from(["a", "b", "[ab]", ".", r"\w", "a?", "b?"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{2,20}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=400)
@given(expressions)
def test_what_passes_ends_in_time_on_text_that_does_not_match(pattern: str) -> None:
    if slow(f"{pattern}!") is not None:
        return
    for text in ("a" * 24, "ab" * 12, "aab" * 8):
        start = time.perf_counter()
        re.fullmatch(f"{pattern}!", text)
        assert time.perf_counter() - start < 0.5, (pattern, text)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": "(a+)+b"},
        {"target_modules": ["up"], "exclude_modules": "(a+)+b"},
        {"target_modules": ["up"], "rank_pattern": {"(a+)+b": 4}},
        {"target_modules": ["up"], "alpha_pattern": {"(a+)+b": 4}},
        {"target_modules": ["up"], "layers_pattern": "(a+)+b", "layers_to_transform": [0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_a_config_with_such_an_expression_is_refused(
    kind: type[PeftConfig], values: dict[str, object]
) -> None:
    words = r"`\w+_\w+` \(='\(a\+\)\+b'\) is an expression that could take for ever"
    with pytest.raises(ConfigError, match=words):
        kind(**values)
    with pytest.raises(ConfigError, match=words):
        PeftConfig.from_dict(values | {"peft_type": kind().peft_type})
