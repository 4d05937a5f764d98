"""What the doctor finds in an adapter's files, each thing by itself, and what it mends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multigraft import AdapterNameError, CheckpointError, LoraConfig, PeftModel, doctor
from multigraft.config import CONFIGS
from tests.diagnosis.files import (
    PREFIX,
    SETTINGS,
    UP_A,
    UP_B,
    WEIGHTS,
    Tensors,
    into_memory,
    only,
    output,
    rename,
    resettle,
    rewrite,
    settings,
    tensors,
    the,
    without_prefix,
    write,
)
from tests.weaknesses import nets


def test_nothing_is_found_in_good_files(folder: Path) -> None:
    for base in (None, nets.net()):
        found = doctor(folder, base)
        assert found.is_healthy
        assert not found.notes
        assert not found.done
    assert str(found) == f"{folder}: no findings, no notes"


OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_modules": ["up"], "total_step": 10},
    "IA3": {"target_modules": ["up"], "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed"], "token_indices": [1, 2]},
    "OFT": {"target_modules": ["up"], "oft_block_size": 4},
}
NEEDS_MORE = ("ADAPTION_PROMPT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")


@pytest.mark.parametrize("method", sorted(set(CONFIGS) - set(NEEDS_MORE)))
def test_nothing_is_found_in_good_files_of_any_method(method: str, tmp_path: Path) -> None:
    options = OPTIONS.get(method, {"target_modules": ["up", "down"]})
    found = doctor(write(tmp_path, CONFIGS[method](**options)), nets.net())
    assert found.is_healthy, str(found)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["up"]},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"rank_pattern": {"up": 3}},
        {"target_modules": "all-linear"},
        {"target_modules": r"blocks\.\d\.(up|down)"},
        {"trainable_token_indices": {"embed": [1, 2]}, "target_modules": ["up"]},
        {"target_parameters": ["up.weight"], "target_modules": []},
        {"exclude_modules": ["conv"]},
    ],
    ids=str,
)
def test_nothing_is_found_with_options_of_lora(options: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["up", "conv"], **options})
    found = doctor(write(tmp_path, config), nets.net())
    assert found.is_healthy, str(found)


# The files.


def test_a_folder_without_an_adapter_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        doctor(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_a_file_that_is_missing_is_found(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert the(doctor(folder), "missing file").path == name


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (WEIGHTS, b"text", "is damaged or no safetensors file"),
        (WEIGHTS, (1 << 60).to_bytes(8, "little") + b"{}", "claims a header of 1,152,921"),
        (SETTINGS, b"[" * 100_000, "not valid JSON"),
        (SETTINGS, b" " * (3 << 20), "has more than 2,097,152 bytes"),
        (SETTINGS, b'{"a":' * 50 + b"1" + b"}" * 50, "nested more than 32 levels deep"),
    ],
    ids=["text", "long header", "brackets", "megabytes", "deep"],
)
def test_a_hostile_file_is_a_finding(name: str, data: bytes, words: str, folder: Path) -> None:
    (folder / name).write_bytes(data)
    finding = the(doctor(folder), "unreadable file")
    assert finding.path == name
    assert words in finding.problem
    assert finding.remedy


def test_a_link_to_elsewhere_is_a_finding(folder: Path, tmp_path: Path) -> None:
    os.replace(folder / WEIGHTS, tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    finding = only(doctor(folder), "unreadable file")
    assert "leads out of" in finding.problem


def test_a_pickle_is_not_read_and_becomes_safetensors_when_allowed(folder: Path) -> None:
    wanted, held = output(folder), tensors(folder)
    torch.save(held, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    finding = only(doctor(folder, fix=True), "pickle")
    assert "--allow-pickle --fix" in finding.remedy
    assert not (folder / WEIGHTS).exists()
    found = doctor(folder, fix=True, allow_pickle=True)
    assert "adapter_model.bin: written as safetensors" in found.done
    assert found.is_healthy
    assert torch.equal(output(folder), wanted)


# The config.


@pytest.mark.parametrize("given", [..., "lora", "Lora"], ids=str)
def test_a_method_that_is_missing_or_misspelt_is_told_by_the_tensors(
    given: object, folder: Path
) -> None:
    resettle(folder, peft_type=given)
    assert only(doctor(folder), "method").is_fixable
    found = doctor(folder, nets.net(), fix=True)
    assert found.is_healthy
    assert settings(folder)["peft_type"] == "LORA"


def test_a_method_that_is_not_built_is_found_with_the_nearest(folder: Path) -> None:
    resettle(folder, peft_type="LOHAA")
    finding = the(doctor(folder, fix=True), "method")
    assert "Write LOHA" in finding.remedy
    assert not finding.is_fixable


def test_a_value_that_cannot_be_is_found(folder: Path) -> None:
    resettle(folder, r=0)
    assert "`r` (=0) must be" in only(doctor(folder), "values of the config").problem


def test_numbers_and_truth_values_in_quotes_are_mended(folder: Path) -> None:
    wanted = output(folder)
    resettle(folder, r="2", lora_alpha="8", use_rslora="false")
    assert only(doctor(folder), "values of the config").is_fixable
    found = doctor(folder, fix=True)
    assert found.is_healthy
    assert {settings(folder)[k] for k in ("r", "lora_alpha", "use_rslora")} == {2, 8, False}
    assert torch.equal(output(folder), wanted)


def test_a_misspelt_key_is_found_with_the_nearest_name(folder: Path) -> None:
    values = settings(folder)
    resettle(folder, lora_alpha=..., lora_aplha=values["lora_alpha"])
    finding = only(doctor(folder), "unknown keys")
    assert finding.path == f"{SETTINGS}: `lora_aplha`"
    assert "the nearest is `lora_alpha`, which is not set" in finding.problem


def test_a_key_of_another_version_is_a_note(folder: Path) -> None:
    resettle(folder, use_the_newest_thing=True, peft_version="9.1.0")
    found = doctor(folder)
    assert found.is_healthy
    assert [note.law for note in found.notes] == ["unknown keys", "version"]


def test_nothing_of_a_file_reaches_the_terminal_but_text(folder: Path) -> None:
    evil = "\x1b[2J\x1b]0;x\x07"
    names = {"target_modules": [evil, "up"], evil: evil, "base_model_name_or_path": evil}
    resettle(folder, **names, peft_version=f"99{evil}", task_type=evil)
    for _ in range(2):
        found = doctor(folder, nets.net())
        assert not found.is_healthy
        assert str(found).replace("\n", "").isprintable()
        resettle(folder, task_type=None, peft_type=evil)


# The tensors against the config.


def test_another_rank_is_found_once_with_the_number_of_sites(folder: Path) -> None:
    resettle(folder, r=4)
    finding = only(doctor(folder), "ranks")
    assert "has rank 2 and the config means 4, at 4 sites" in finding.problem
    assert "`lora_alpha`" in finding.remedy


def test_a_pair_without_its_half_is_found(folder: Path) -> None:
    rewrite(folder, lambda held: {k: t for k, t in held.items() if k != UP_B})
    finding = only(doctor(folder), "pairs")
    assert (finding.path, finding.problem) == ("blocks.0.up", "has `lora_A` and no `lora_B`.")


def test_a_pair_of_two_ranks_is_found(folder: Path) -> None:
    rewrite(folder, lambda held: held | {UP_B: torch.ones(12, 3)})
    assert "(2, 8) and `lora_B` (12, 3)" in only(doctor(folder), "pairs").problem


def test_a_target_without_tensors_is_found_with_the_nearest(folder: Path) -> None:
    resettle(folder, target_modules=["up", "conv", "embed", "zzz", "upp"])
    found = [each.problem for each in doctor(folder).findings]
    assert found == [
        "`zzz` is a target without a tensor.",
        "`upp` is a target without a tensor. Nearest: `up`.",
    ]


def test_tensors_that_are_no_target_are_found(folder: Path) -> None:
    resettle(folder, target_modules=["up", "embed"])
    finding = only(doctor(folder), "targets")
    assert finding.path == "conv"
    assert "Add conv to `target_modules`" in finding.remedy


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_an_option_without_its_tensors_is_found(option: str, tmp_path: Path) -> None:
    folder = write(tmp_path, LoraConfig(r=2, target_modules=["up"]))
    resettle(folder, **{option: True})
    finding = only(doctor(folder), "magnitudes and biases")
    assert "is True, and 0 of 2 sites have" in finding.problem
    assert f"Set `{option}` to False" in finding.remedy


def test_tensors_of_the_base_are_found_and_left_out(folder: Path) -> None:
    before = tensors(folder)
    state = PeftModel.from_pretrained(nets.net(), folder).state_dict()
    save_file(state, folder / WEIGHTS)
    assert the(doctor(folder), "tensors of the base").is_fixable
    found = doctor(folder, nets.net(), fix=True)
    assert found.is_healthy, str(found)
    kept = {f"{PREFIX}embed.base_layer.weight"}  # which PEFT saves with adapted embeddings too
    assert tensors(folder).keys() == before.keys() | kept


# The values.


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_found_by_their_tensor(value: float, folder: Path) -> None:
    rewrite(folder, lambda held: held | {UP_A: torch.full((2, 8), value)})
    assert only(doctor(folder), "non-finite values").path == UP_A


def test_an_adapter_that_adds_nothing_is_a_note(tmp_path: Path) -> None:
    rewrite(write(tmp_path, LoraConfig(r=2, target_modules=["up"])), zero("lora_B"))
    found = doctor(tmp_path)
    assert found.is_healthy
    assert "adds nothing at any site" in the(found, "dead adapters").problem


def test_a_site_that_adds_nothing_is_a_note_with_its_path(folder: Path) -> None:
    rewrite(folder, zero(UP_B))
    assert the(doctor(folder), "dead adapters").path == "blocks.0.up"


def zero(part: str) -> Callable[[Tensors], None]:
    def change(held: Tensors) -> None:
        for key, tensor in held.items():
            if part in key:
                tensor.zero_()

    return change


def test_integers_in_place_of_fractions_are_found(folder: Path) -> None:
    rewrite(folder, lambda held: held | {UP_A: held[UP_A].to(torch.int8)})
    assert the(doctor(folder), "dtypes").path == UP_A


def test_several_dtypes_side_by_side_are_a_note(folder: Path) -> None:
    rewrite(folder, lambda held: held | {UP_A: held[UP_A].half()})
    found = doctor(folder)
    assert found.is_healthy
    assert "1 of float16" in the(found, "dtypes").problem


# Mending.


def test_old_files_are_kept_beside_the_new_ones_and_never_overwritten(folder: Path) -> None:
    for number in ("", "1"):
        rename(folder, without_prefix)
        before = (folder / WEIGHTS).read_bytes()
        found = doctor(folder, fix=True)
        assert (folder / f"{WEIGHTS}.bak{number}").read_bytes() == before
        assert f"{WEIGHTS}.bak{number}" in found.done[-1]


def test_new_files_may_go_elsewhere_and_leave_the_old_ones(folder: Path, tmp_path: Path) -> None:
    wanted = output(folder)
    rename(folder, without_prefix)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = doctor(folder, fix=True, output=tmp_path / "new")
    assert found.is_healthy
    assert found.source == str(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(output(tmp_path / "new"), wanted)


def test_files_of_a_cache_are_not_written_in_place(folder: Path, tmp_path: Path) -> None:
    rename(folder, without_prefix)
    snapshot = tmp_path / "models--a" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    os.replace(folder, tmp_path / "models--a" / "blobs")
    for name in (WEIGHTS, SETTINGS):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with pytest.raises(CheckpointError, match="holds links, as a cache does"):
        doctor(snapshot, fix=True)
    assert doctor(snapshot, fix=True, output=tmp_path / "new").is_healthy


def test_a_disk_that_refuses_leaves_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename(folder, without_prefix)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multigraft.atomic.os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        doctor(folder, fix=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_that_the_file_does_not_hold_is_the_users_mistake(folder: Path) -> None:
    rename(folder, into_memory)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        AdapterNameError, match=r"holds no tensors of `other`. There are: `default`"
    ):
        doctor(folder, fix=True, adapter_name="other")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_one_adapter_is_taken_out_of_a_file_of_several(folder: Path) -> None:
    wanted = output(folder)
    rewrite(folder, lambda held: both(held))
    assert (
        "several adapters: `default`, `other`" in only(doctor(folder), "names of tensors").problem
    )
    found = doctor(folder, fix=True, adapter_name="default")
    assert found.is_healthy, str(found)
    assert "left out the tensors of `other`" in found.done
    assert torch.equal(output(folder), wanted)


def both(held: Tensors) -> Tensors:
    own = {into_memory(key): tensor for key, tensor in held.items()}
    other = {
        key.replace(".default", ".other"): t + 1 for key, t in own.items() if ".default" in key
    }
    return own | other


def test_what_is_found_is_given_as_plain_values(folder: Path) -> None:
    resettle(folder, r=4)
    given = json.loads(json.dumps(doctor(folder).to_dict()))
    assert given["is_healthy"] is False
    assert given["findings"][0].keys() == {"check", "path", "what", "remedy", "is_fixable"}
    assert given["findings"][0]["check"] == "ranks"
