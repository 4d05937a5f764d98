"""Tasks by name, and their options."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from multigraft import ConfigError, UnsupportedError
from multigraft.train.tasks import TASKS, described, task_of


def test_a_name_alone_has_the_usual_options():
    task = task_of("causal-lm")
    assert task == task_of({"name": "causal-lm"})
    assert task_of(task) is task


@pytest.mark.parametrize("name", list(TASKS))
def test_what_describes_a_task_makes_the_same_one(name):
    task = task_of(name)
    assert task_of(json.loads(json.dumps(described(task)))) == task


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_is_known_by_its_own_name_and_never_changes(name):
    task = task_of(name)
    assert task.name == name
    with pytest.raises((FrozenInstanceError, AttributeError)):
        task.beta = 1.0


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UnsupportedError, match=r"task `causal` is unknown. Nearest: `causal-lm`"):
        task_of("causal")


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match=r"`causal-lm` has no option `beta`. It has none"):
        task_of({"name": "causal-lm", "beta": 1})


@pytest.mark.parametrize("value", [3, None, {"beta": 1}, {"name": 3}])
def test_what_is_neither_name_nor_mapping_is_refused(value):
    with pytest.raises(ConfigError, match="must be a name, or a mapping with a `name`"):
        task_of(value)
