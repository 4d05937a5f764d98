"""Files: what is compared, reported, found and written. Damaged ones are in `bad_input`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from multigraft import CheckpointError, LoraConfig, get_peft_model
from multigraft.checkpoint import (
    LoadReport,
    adapter_state,
    compare,
    locate,
    locate_weights,
    read,
    rename,
    save,
)
from tests.subject import Subject

A, B = "head.lora_A.weight", "head.lora_B.weight"
EXPECTED: dict[str, tuple[int, ...]] = {A: (2, 16), B: (5, 2)}


def good() -> dict[str, Tensor]:
    return {key: torch.ones(shape) for key, shape in EXPECTED.items()}


def test_tensors_that_fit_are_given_back_and_nothing_is_reported() -> None:
    tensors = good()
    report, fitting = compare(EXPECTED, tensors)
    assert report == LoadReport()
    assert fitting == tensors


def test_each_disagreement_is_listed_under_its_own_name_with_the_files_key() -> None:
    found = {A: torch.ones(3, 16), "head.lora_C.weight": torch.ones(1)}
    report, fitting = compare(EXPECTED, found)
    assert report.missing_keys == [f"base_model.model.{B}"]
    assert report.unexpected_keys == ["base_model.model.head.lora_C.weight"]
    assert report.mismatched_keys == [(f"base_model.model.{A}", (3, 16), (2, 16))]
    assert fitting == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_reported_and_still_fits(value: float) -> None:
    tensors = good() | {B: torch.full((5, 2), value)}
    report, fitting = compare(EXPECTED, tensors)
    assert report.nonfinite_keys == [f"base_model.model.{B}"]
    assert set(fitting) == {A, B}


def test_integers_and_tensors_on_the_meta_device_are_not_asked_for_their_values() -> None:
    expected = {"a": (2,), "b": (2,)}
    report, _ = compare(expected, {"a": torch.ones(2).long(), "b": torch.ones(2, device="meta")})
    assert report == LoadReport()


@pytest.mark.parametrize(
    ("report", "allowed"),
    [
        (LoadReport(missing_keys=["m"]), {"strict": False}),
        (LoadReport(unexpected_keys=["u"]), {"strict": False}),
        (LoadReport(nonfinite_keys=["n"]), {"strict": False}),
        (LoadReport(mismatched_keys=[("s", (1,), (2,))]), {"ignore_mismatched_sizes": True}),
    ],
    ids=["missing", "unexpected", "not finite", "of another shape"],
)
def test_a_problem_raises_unless_that_very_kind_is_allowed(
    report: LoadReport, allowed: dict[str, bool]
) -> None:
    report.check("here", **allowed)
    other = {"strict": True, "ignore_mismatched_sizes": "strict" in allowed}
    with pytest.raises(CheckpointError, match="here does not fit"):
        report.check("here", **other)


def test_a_long_list_is_cut_and_counted() -> None:
    with pytest.raises(CheckpointError, match=r"k0, k1, k2, k3, k4 and 7 more"):
        LoadReport(missing_keys=[f"k{i}" for i in range(12)]).check("here")


def test_the_first_pattern_that_matches_renames_and_the_others_do_not() -> None:
    mapping = {r"^old\.": "new.", r"^new\.": "newer.", "A": "B"}
    renamed = rename({"old.A": torch.ones(1), "other.A": torch.zeros(1)}, mapping)
    assert list(renamed) == ["new.A", "other.B"]
    assert list(rename({"a": torch.ones(1)}, None)) == ["a"]


def test_an_adapters_state_is_its_own_tensors_and_not_copies() -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"]), "a")
    model.add_adapter("b", subject.config(["up"]))
    state = adapter_state(model.roster, "a")
    assert set(state) == {A, B}
    assert state[A] is subject.base.head.lora_A["a"].weight


def test_gathered_values_stand_for_the_models_own() -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"]), "v1.0")
    gathered = {"head.lora_A.v1%2E0.weight": torch.zeros(2, 16)}
    state = adapter_state(model.roster, "v1.0", gathered)
    assert state[A] is gathered["head.lora_A.v1%2E0.weight"]
    assert state[B] is subject.base.head.lora_B["v1.0"].weight


def test_tensors_of_one_memory_or_not_contiguous_are_written_as_their_values(
    tmp_path: Path,
) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    state = {"a.w": whole, "a.first": whole[0], "a.turned": whole.T}
    save(tmp_path, {tmp_path: (LoraConfig(), state)})
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert written.keys() == {f"base_model.model.{key}" for key in state}
    assert torch.equal(written["base_model.model.a.turned"], whole.T)
    assert torch.equal(written["base_model.model.a.first"], whole[0])


def test_tensors_that_lie_as_the_file_wants_them_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was copied")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", refuse)
        model.save_pretrained(tmp_path)
    assert len(read(tmp_path / "adapter_model.safetensors")) == 10


def test_a_card_names_the_base_and_the_method(tmp_path: Path) -> None:
    config = LoraConfig(base_model_name_or_path="someone/base")
    save(tmp_path, {tmp_path: (config, {})})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model: someone/base\nbase_model_relation: adapter\nlibrary_name: peft\n"
    )
    assert "- lora\n" in card


def test_keys_are_read_below_the_base(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model._orig_mod.{A}": torch.ones(2)}, path)
    assert list(read(path)) == [A]


def test_safetensors_are_found_before_pickles(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    assert locate_weights(tmp_path).name == "adapter_model.bin"
    (tmp_path / "adapter_model.safetensors").touch()
    assert locate_weights(tmp_path).name == "adapter_model.safetensors"


@pytest.mark.parametrize("options", [{"subfolder": "deep"}, {}])
def test_a_file_is_found_in_its_folder_without_the_hub(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.chdir(tmp_path)
    folder = Path("adapter") / options.get("subfolder", "")
    folder.mkdir(parents=True)
    (folder / "file").touch()
    assert locate("adapter", "file", **options) == folder / "file"
