"""diffusers' pipelines, unmodified, with Multigraft in PEFT's place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat.running import Facts, differences, facts_of

pytest.importorskip("diffusers")
WIDE = {"unet": ["wide"], "text_encoder": ["wide"]}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return facts_of("pipelines", tmp_path_factory)


@pytest.fixture
def found(facts: Facts) -> dict[str, Any]:
    return facts.aliased


def test_every_image_is_as_with_peft(facts: Facts) -> None:
    assert differences(facts) == {}


def test_files_are_loaded_side_by_side(found: dict[str, Any]) -> None:
    assert found["it acts"]
    assert found["adapters"] == {"unet": ["wide", "narrow"], "text_encoder": ["wide"]}


def test_adapters_are_weighted_together_whatever_parts_they_have(found: dict[str, Any]) -> None:
    weighted, active = found["both"]
    assert active == ["wide", "narrow"]
    assert weighted != found["block by block"]
    assert found["one again"] == 0.0


def test_a_scale_holds_for_one_call(found: dict[str, Any]) -> None:
    assert found["scaled for a call"] != found["both"][0]
    assert found["no longer scaled"] == 0.0


def test_fusing_keeps_the_image_and_is_undone(found: dict[str, Any]) -> None:
    assert found["fused"] == [0.0, 1, ["wide"]]
    assert found["unfused"] == [0.0, 0]


def test_adapters_are_switched_off_and_on(found: dict[str, Any]) -> None:
    assert (found["disabled"], found["enabled"]) == (0.0, 0.0)


def test_deleting_leaves_the_others_and_then_the_base(found: dict[str, Any]) -> None:
    assert found["one is left"] == [WIDE, 0.0]
    assert found["none is left"] == [{}, 0.0]


def test_unloading_by_diffusers_itself_leaves_the_base_free_for_more(found: dict[str, Any]) -> None:
    assert found["unloaded"] == [{}, 0.0] and not found["nothing is wrapped"]
    assert found["loaded again"] == [WIDE, 0.0]


def test_what_was_fused_stays_when_the_adapter_goes(found: dict[str, Any]) -> None:
    assert found["fused for good"] == 0.0


def test_training_scripts_add_save_and_load_with_the_config(found: dict[str, Any]) -> None:
    assert found["trained"] == 64
    assert found["its config came with it"] == [4, 8]


def test_a_diffusion_transformer_goes_the_same_ways(found: dict[str, Any]) -> None:
    assert found["flux: it acts"] and found["flux: saved"]
    assert found["flux: both"] != found["flux: scaled"]
    assert [found[f"flux: {what}"] for what in ("fused", "unfused", "deleted")] == [0.0, 0.0, 0.0]


def test_a_file_is_swapped_in(found: dict[str, Any]) -> None:
    assert found["flux: swapped in"] == 0.0


def test_layerwise_casting_leaves_the_pairs_alone(found: dict[str, Any]) -> None:
    assert found["flux: pairs are not cast"] == ["torch.float32"]


def test_a_lokr_file_acts(found: dict[str, Any]) -> None:
    assert found["flux: lokr"] != 0.0


def test_a_file_that_fits_nothing_changes_nothing(found: dict[str, Any]) -> None:
    assert found["flux: a file that fits nothing"] == 0.0
    assert found["flux: adapters after that"] == ["kronecker"]
