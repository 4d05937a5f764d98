"""Every key of a run's file is a flag, and says the same."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from multigraft import ConfigError
from multigraft.cli.app import app
from multigraft.cli.flags import given, with_flags
from multigraft.train.spec import RunSpec, run_of


def flags_of(*words: str) -> dict[str, object]:
    seen = []
    command = typer.Typer()
    command.command()(with_flags(RunSpec, lambda flags=None: seen.append(flags)))
    result = CliRunner().invoke(command, list(words))
    assert result.exit_code == 0, result.output
    return given(RunSpec, seen[0])


def test_every_key_is_a_flag_of_train():
    names = {
        option
        for command in typer.main.get_command(app).commands["train"].params
        for option in command.opts
    }
    assert {f"--{key.replace('_', '-')}" for key in RunSpec.model_fields} <= names


def test_only_what_is_given_is_passed_on():
    assert flags_of() == {}
    assert flags_of("--rank", "4", "--packing", "-o", "out") == {
        "rank": 4,
        "packing": True,
        "output": "out",
    }


def test_a_switch_can_be_turned_off():
    assert flags_of("--no-keep-best") == {"keep_best": False}


def test_values_of_every_shape_reach_the_schema():
    flags = flags_of(
        *("--model", "m", "--output", "o", "--data", "d", "--target-modules", "q_proj,v_proj"),
        *("--config", "use_dora=true", "--config", "bias=all", "--sweep", "rank=[4,8]"),
        *("--adapters", "[{name: a, lr: 0.1}, {name: b}]", "--task", "seq-cls"),
    )
    run = run_of({}, flags)
    assert run.config == {"use_dora": True, "bias": "all"}
    assert run.sweep == {"rank": [4, 8]}
    assert [adapter.name for adapter in run.adapters or ()] == ["a", "b"]
    assert (run.target_modules, run.task) == ("q_proj,v_proj", "seq-cls")


def test_adapters_on_the_command_line_are_read_as_those_of_a_file():
    (adapter,) = (
        run_of(
            {"model": "m", "output": "o"}, flags_of("--adapters", "[{name: a, lr: 1e-4}]")
        ).adapters
        or ()
    )
    assert adapter.lr == 1e-4


def test_adapters_that_are_no_yaml_are_told():
    with pytest.raises(ConfigError, match=r"--adapters, line 1: this is no YAML"):
        flags_of("--adapters", "[{name: a")
