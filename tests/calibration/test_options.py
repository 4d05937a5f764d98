"""Options of the initialisations with data that no other test of them turns."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from multigraft import get_eva_state_dict
from tests.calibration import test_corda, test_eva, test_loraga
from tests.initialisations.nets import batch, factors, off
from tests.oracle import quiet


@pytest.mark.parametrize("half", [False, True])
def test_cordas_sums_may_be_in_the_inputs_own_dtype(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"use_float16_for_covariance": half}
    model, other = test_corda.mine(**options), test_corda.theirs(monkeypatch, **options)
    for path in ("first", "second"):
        (A, B), (A2, B2) = factors(model, path), factors(other, path)
        assert off(B @ A, B2 @ A2) < 1e-4


@pytest.mark.parametrize("verbose", [False, True])
def test_cordas_progress_is_shown_on_request_and_changes_nothing(
    verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = test_corda.mine(verbose=verbose)
    assert bool(capsys.readouterr().err) == verbose
    for path in ("first", "second"):
        pairs = zip(factors(model, path), factors(test_corda.mine(), path), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_evas_label_that_does_not_count_may_be_another() -> None:
    """Rows are left out by it, so it changes the directions, as in PEFT."""
    data = test_eva.batches()
    for each in data:
        each["labels"] = torch.where(each["labels"] == -100, 7, each["labels"])
    found = []
    for value in (-100, 7):
        mine, theirs = test_eva.both({"rho": 1.0, "label_mask_value": value})
        own = get_eva_state_dict(mine, copy.deepcopy(data), **test_eva.QUIET)
        with quiet():
            other = peft.get_eva_state_dict(theirs, copy.deepcopy(data), show_progress_bar=False)
        for name, directions in other.items():
            torch.testing.assert_close(own[name].float(), directions.float(), atol=1e-5, rtol=0)
        found.append(own)
    assert any(not torch.allclose(found[0][name], found[1][name], atol=1e-3) for name in found[0])


@pytest.mark.parametrize("gamma", [4, 100])
def test_lora_gas_gamma_scales_as_pefts(gamma: int) -> None:
    options: dict[str, Any] = {"direction": "ArBr", "scale": "stable", "stable_gamma": gamma}
    model, other = test_loraga.mine(**options), test_loraga.theirs(**options)
    for path in ("first", "second"):
        pairs = zip(factors(model, path), factors(other, path), strict=True)
        assert all(off(a.abs(), b.abs()) < 1e-3 for a, b in pairs)
    assert torch.isfinite(model(batch())).all()
