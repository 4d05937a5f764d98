"""Names of classes: found in values of any kind, and which one a value means."""

from __future__ import annotations

import pytest

from multigraft import ConfigError, DataError
from multigraft.train.labels import check_names, class_of, names_in, require_names
from multigraft.train.records import Refusal


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "B"], ("B", "a", "b")),
        ([2, 10, 1.0, "3"], ("1", "2", "3", "10")),
        ([0.5, 1], ("0.5", "1")),
        ([1, "x"], ("1", "x")),
    ],
)
def test_names_stand_in_an_order_that_depends_on_them_alone(values, names):
    assert names_in(values) == names_in(values[::-1]) == names


@pytest.mark.parametrize("values", [[], ["a"], [1, 1.0, "1"]])
def test_fewer_than_two_are_nothing_to_tell_apart(values):
    with pytest.raises(DataError, match="nothing to tell apart"):
        names_in(values)


def test_a_name_wins_over_a_number():
    assert class_of("1", ("1", "0")) == 0
    assert class_of(1, ("1", "0")) == 0
    assert class_of(1, ("no", "yes")) == 1
    assert class_of(1.0, ("no", "yes")) == 1
    assert class_of("1", ("no", "yes")) == 1


@pytest.mark.parametrize("value", [2, -1, 0.5, "maybe", "2"])
def test_what_is_neither_is_refused_with_those_that_are_known(value):
    with pytest.raises(Refusal, match=r"is unknown.*Known: `no`, `yes`"):
        class_of(value, ("no", "yes"))


def test_names_are_checked_and_required():
    check_names(("a", "b"), "seq-cls")
    for names in (("a", ""), ("a", 1), "ab", None):
        with pytest.raises(ConfigError, match="must be a list of names"):
            check_names(names, "seq-cls")
    with pytest.raises(ConfigError, match="`a` more than once"):
        check_names(("a", "a"), "seq-cls")
    with pytest.raises(ConfigError, match="not known yet"):
        require_names((), "seq-cls")
