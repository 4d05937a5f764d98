"""A config from a method's name and the fields that somebody gave."""

from __future__ import annotations

import pytest

from multigraft import AdaLoraConfig, ConfigError, LoraConfig, UnsupportedError
from multigraft.inspection import config_for


def test_the_method_makes_the_class_and_none_is_the_default():
    assert config_for("lora", {"r": 4, "target_modules": None}) == LoraConfig(r=4)


def test_the_rank_is_what_the_method_calls_it():
    assert config_for("LoRA", {"rank": 3}).r == 3
    found = config_for("adalora", {"rank": 3, "total_step": 5})
    assert (type(found), found.init_r, found.r) == (AdaLoraConfig, 3, 8)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("lora", {"rnk": 3}, "there is no field `rnk`"),
        ("lora", {"lora_alfa": 3}, "Nearest: `lora_alpha`"),
        ("ia3", {"rank": 3}, "there is no field `rank`"),
        ("lora", {"rank": 0}, "must be an integer of at least 1"),
        ("lora", {"layers_to_transform": {}, "target_modules": 3}, "target_modules"),
    ],
)
def test_a_field_that_cannot_be_is_an_error(method, fields, message):
    with pytest.raises(ConfigError, match=message):
        config_for(method, fields)


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(UnsupportedError, match="Nearest: `LORA`"):
        config_for("lorra", {})
