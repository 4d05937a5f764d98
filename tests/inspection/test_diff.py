"""Two adapters compared: configs, tensors, and the changes that they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft import (
    CheckpointError,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    TargetError,
    diff,
    get_peft_model,
)
from tests.inspection.adapters import net, write

PREFIX = "base_model.model."


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "a"), write(tmp_path / "b")


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Exchange tensors of a file by their key's end; None takes one out."""
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    for end, value in tensors.items():
        key = next(k for k in [*held, end] if k.endswith(end))
        held.pop(key, None)
        if value is not None:
            held[key] = value
    save_file(held, path, {"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_copies_are_the_same(pair):
    found = diff(*pair)
    assert found.is_same
    assert (found.same, found.tensors, found.fields, found.changes) == (12, (), (), ())
    assert str(found).endswith("are the same")


def test_other_values_are_measured(pair):
    a, b = pair
    key = "layers.0.up.lora_A.weight"
    A = load_file(a / "adapter_model.safetensors")[PREFIX + key]
    edit(b, **{key: A * 1.5})
    (each,) = diff(a, b).tensors
    assert (each.key, each.kind) == (key, "values")
    assert each.largest == pytest.approx(float(A.abs().max()) / 2)
    assert (each.relative, each.cosine) == (pytest.approx(0.5), pytest.approx(1.0))


def test_the_change_at_each_site_is_compared_as_dense_products_are(tmp_path):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", seed=2, target_modules=["up"], r=2, lora_alpha=5, use_rslora=True)
    found = {each.path: each for each in diff(a, b).changes}
    deltas = [
        {
            key.removesuffix(".lora_A.weight"): scale * held[key.replace("_A", "_B")] @ held[key]
            for key in held
            if "_A" in key
        }
        for held, scale in [
            (load_file(a / "adapter_model.safetensors"), 8 / 4),
            (load_file(b / "adapter_model.safetensors"), 5 / 2**0.5),
        ]
    ]
    assert set(found) == {key.removeprefix(PREFIX) for key in deltas[0]}
    for path, each in found.items():
        first = deltas[0][PREFIX + path]
        second = deltas[1].get(PREFIX + path, torch.zeros_like(first))
        assert each.first == pytest.approx(float(first.norm()), rel=1e-5)
        assert each.second == pytest.approx(float(second.norm()), rel=1e-5)
        assert each.distance == pytest.approx(float((first - second).norm()), rel=1e-5)
        if float(second.norm()):
            cosine = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0)
            assert each.cosine == pytest.approx(float(cosine), abs=1e-5)
        else:
            assert each.cosine is None


def test_other_factors_of_the_same_change_are_seen_as_such(pair):
    a, b = pair
    held = load_file(b / "adapter_model.safetensors")
    for key, tensor in held.items():
        held[key] = tensor * 4 if "lora_A" in key else tensor / 4
    save_file(held, b / "adapter_model.safetensors", {"format": "pt"})
    found = diff(a, b)
    assert not found.is_same
    assert len(found.tensors) == 12
    assert max(each.relative for each in found.changes) < 1e-6
    assert "changes: equal at all 6 sites, whatever the factors" in str(found)


def test_repeats_are_folded_and_equal_changes_stand_apart(pair):
    a, b = pair
    held = load_file(b / "adapter_model.safetensors")
    for key, tensor in held.items():
        if "lora_B" in key and "layers.1" in key and "up" in key:
            held[key] = tensor * 3
        elif "up" in key:
            held[key] = tensor * (2 if "lora_A" in key else 0.5)
    save_file(held, b / "adapter_model.safetensors", {"format": "pt"})
    lines = [" ".join(line.split()) for line in str(diff(a, b)).splitlines()]
    (first,) = [line for line in lines if line.startswith("~ layers.{0..2}.up.lora_B.weight ×3")]
    assert first.split()[-2:] == ["2", "1"]  # the largest relative distance, the smallest cosine
    down, equal, other = [line for line in lines if line.startswith("layers.")]
    assert equal.startswith("layers.{0,2}.up ×2 ")
    assert other.startswith("layers.1.up ")
    assert down.startswith("layers.{0..2}.down ×3 ")


def test_another_scaling_of_equal_tensors_is_another_change(pair):
    a, b = pair
    set_config(b, lora_alpha=16)
    found = diff(a, b)
    assert [(f.key, f.first, f.second) for f in found.fields] == [("lora_alpha", 8, 16)]
    assert found.tensors == ()
    assert {round(each.relative, 6) for each in found.changes} == {1.0}


def test_tensors_that_one_file_lacks_are_named(pair):
    a, b = pair
    edit(a, **{"layers.0.up.lora_A.weight": None})
    edit(b, **{f"{PREFIX}layers.9.up.lora_A.weight": torch.zeros(2, 2)})
    kinds = {each.key: each.kind for each in diff(a, b).tensors}
    assert kinds == {"layers.0.up.lora_A.weight": "added", "layers.9.up.lora_A.weight": "added"}
    assert {each.kind for each in diff(b, a).tensors} == {"removed"}


def test_another_shape_or_dtype_is_said(pair):
    a, b = pair
    held = load_file(b / "adapter_model.safetensors")
    half = held[PREFIX + "layers.0.up.lora_A.weight"].half()
    edit(
        b,
        **{"layers.0.up.lora_A.weight": half, "layers.0.up.lora_B.weight": torch.zeros(16, 3)},
    )
    found = {each.key: each for each in diff(a, b).tensors}
    assert found["layers.0.up.lora_A.weight"].kind == "dtype"
    assert found["layers.0.up.lora_A.weight"].second == "float16 4×8"
    assert (found["layers.0.up.lora_B.weight"].kind, len(found)) == ("shape", 2)


def test_the_order_of_names_in_a_config_is_no_difference(pair):
    a, b = pair
    set_config(a, target_modules=["up", "down"])
    set_config(b, target_modules=["down", "up"])
    assert diff(a, b).is_same


def test_true_is_not_one_in_a_config(pair):
    a, b = pair
    set_config(a, note=1)
    set_config(b, note=True)
    assert [each.key for each in diff(a, b).fields] == ["note"]


def test_a_key_that_one_config_lacks_is_told_from_null(pair):
    a, b = pair
    set_config(b, note=None)
    (each,) = diff(a, b).fields
    assert (each.key, each.in_first, each.in_second) == ("note", False, True)


def test_nan_is_equal_to_itself_and_to_nothing_else(pair):
    a, b = pair
    for folder in pair:
        edit(folder, **{"layers.0.up.lora_A.weight": torch.full((4, 8), float("nan"))})
    assert diff(a, b).is_same
    edit(b, **{"layers.0.up.lora_A.weight": torch.zeros(4, 8)})
    assert len(diff(a, b).tensors) == 1


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["up"]),
        IA3Config(target_modules=["up"], feedforward_modules=[]),
    ],
    ids=["loha", "ia3"],
)
def test_other_methods_are_compared_on_their_base(tmp_path, config):
    a, b = (write(tmp_path / name, config, seed) for name, seed in (("a", 1), ("b", 2)))
    alone = diff(a, b)
    assert alone.changes == ()
    assert list(alone.left.values()) == [f"{config.peft_type}'s change needs the base's weights"]
    base = net()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    found = {each.path: each for each in diff(a, b, base=base).changes}
    merged = []
    for folder in (a, b):
        merged.append(PeftModel.from_pretrained(net(), folder).merge_and_unload().state_dict())
    for path, each in found.items():
        gap = merged[0][f"{path}.weight"] - merged[1][f"{path}.weight"]
        assert each.distance == pytest.approx(float(gap.norm()), rel=1e-4)
    assert len(found) == 3
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_embeddings_pair_needs_no_base(tmp_path):
    a, b = (write(tmp_path / n, target_modules=["words"], seed=s) for n, s in (("a", 1), ("b", 2)))
    (alone,), (beside,) = diff(a, b).changes, diff(a, b, base=net()).changes
    assert alone.path == "words"
    assert alone.distance == pytest.approx(beside.distance, rel=1e-5)


def test_what_is_no_low_rank_pair_is_left_out_and_named(tmp_path):
    a, b = (
        write(tmp_path / name, seed=seed, modules_to_save=["head"], use_dora=True)
        for name, seed in (("a", 1), ("b", 2))
    )
    left = diff(a, b).left
    assert left["head.weight"] == "no part of a low-rank pair"
    assert left["layers.0.up"] == "its change depends on the base's weight"


def test_a_base_that_does_not_fit_is_an_error(pair, tmp_path):
    other = write(tmp_path / "c", seed=2)
    with pytest.raises(TargetError, match="no module is called"):
        diff(pair[0], other, base=torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_a_folder_without_an_adapter_is_an_error(pair, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        diff(pair[0], tmp_path / "nowhere")


def test_one_adapter_in_a_subfolder_is_found(pair, tmp_path):
    model = get_peft_model(net(), LoraConfig(target_modules=["up"]), adapter_name="named")
    model.save_pretrained(tmp_path / "c")
    assert diff(tmp_path / "c", tmp_path / "c" / "named").is_same
