"""The tree of errors, and the hints that they give."""

from __future__ import annotations

import pytest
import torch

import multigraft
import multigraft.tuner
from multigraft import errors
from multigraft.errors import MultigraftError, did_you_mean, listed, nearest_of, there_are

ALL = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, MultigraftError)]


@pytest.mark.parametrize("error", [e for e in ALL if e is not MultigraftError])
def test_every_error_is_one_of_ours_and_one_of_pythons(error: type[Exception]) -> None:
    assert issubclass(error, MultigraftError)
    assert issubclass(error, (ValueError, RuntimeError, ImportError, TypeError))


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_public_and_drawn_in_the_tree(error: type[Exception]) -> None:
    assert getattr(multigraft, error.__name__) is error
    assert error.__name__ in (errors.__doc__ or "")


def test_the_nearest_names_are_given_best_first_and_few() -> None:
    assert did_you_mean("v_porj", ["q_proj", "v_proj", "head"]).startswith(" Nearest: `v_proj`")
    assert did_you_mean("x", [f"xx{i}" for i in range(9)]).count("`") == 6
    assert did_you_mean("zzz", ["head"]) == ""


def test_what_there_is_is_given_sorted_and_cut() -> None:
    assert there_are(["b", "a", "b"]) == " There are: `a`, `b`."
    assert there_are([f"m{i}" for i in range(30)], limit=2).startswith(" There are: `m0`, `m1`")
    assert "`m2`" not in there_are([f"m{i}" for i in range(30)], limit=2)


def test_many_names_are_cut_and_counted_and_the_first_get_hints() -> None:
    assert listed(["a", "b"]) == "`a`, `b`"
    assert listed([f"m{i}" for i in range(2000)], limit=2) == "`m0`, `m1` and 1,998 more"
    assert nearest_of(["v_porj", "zzz", "haed"], ["v_proj", "head"]).count("Nearest") == 2
    assert nearest_of(["haed"] * 30, ["head"], limit=3).count("Nearest") == 3


def test_pefts_names_catch_ours() -> None:
    assert issubclass(multigraft.TargetError, multigraft.PeftError)
    with pytest.raises(multigraft.NoMatchingPeftModuleError):
        config = multigraft.LoraConfig(target_modules=["absent"])
        multigraft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
    with pytest.warns(multigraft.PeftWarning, match="no adapter is active"):
        multigraft.tuner.Tuner(torch.nn.Linear(2, 2)).merge_and_unload()
