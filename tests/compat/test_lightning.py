"""Lightning with an adapted model, its imports of PEFT unmodified."""

from __future__ import annotations

import pytest

from tests.compat.running import differences, facts_of

pytest.importorskip("lightning")


def test_a_module_is_fitted_restored_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> None:
    facts = facts_of("lightning_fit", tmp_path_factory)
    assert differences(facts) == {}
    found = facts.aliased
    assert found["the pair was trained"] and found["the base was not"] and found["learned"]
    assert found["restored"] == 0.0 and found["resumed"] == 3
