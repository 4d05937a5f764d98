"""Weights in their files: read where they lie, and told when something is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multigraft.errors import CheckpointError
from multigraft.merging.mapped import INDEX, WEIGHTS, MappedWeights

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.randn(3, dtype=torch.bfloat16),
    "c": torch.tensor([True, False]),
    "d": torch.zeros(0, 4),
    "e": torch.tensor(7),
    "f": torch.randn(2, 2).to(torch.float8_e4m3fn),
}


def test_every_dtype_and_shape_reads_as_it_was_written(tmp_path: Path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    found = MappedWeights(tmp_path)
    assert set(found) == set(TENSORS) and len(found) == 6
    for key, value in TENSORS.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        assert torch.equal(found[key].float(), value.float())
    found.forget()
    assert torch.equal(found["a"], TENSORS["a"])
    assert found.size == 24 + 6 + 2 + 0 + 8 + 4


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    MappedWeights(tmp_path)["a"].zero_()
    assert torch.equal(MappedWeights(tmp_path)["a"], TENSORS["a"])


def shards(folder: Path, **index: object) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names, **index}))
    return folder


def test_several_files_are_one(tmp_path: Path):
    found = MappedWeights(shards(tmp_path, metadata={"total_size": 30}))
    assert list(found.files) == ["one.safetensors", "two.safetensors"]
    assert torch.equal(found["b"], TENSORS["b"])


DAMAGED = {
    "no json": ("{", "is damaged"),
    "no map": ("{}", "is damaged"),
    "numbers": ('{"weight_map": {"a": 1}}', "is damaged"),
    "elsewhere": ('{"weight_map": {"a": "../one.safetensors"}}', "there is no"),
    "not there": ('{"weight_map": {"a": "three.safetensors"}}', "there is no three"),
    "lacking": ('{"weight_map": {"a": "one.safetensors", "x": "one.safetensors"}}', "files lack"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_an_index_that_is_wrong_is_told(what: str, tmp_path: Path):
    text, says = DAMAGED[what]
    (shards(tmp_path) / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        MappedWeights(tmp_path)


def test_pickles_are_refused_with_the_remedy(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin are pickles.*save_pretrained"):
        MappedWeights(tmp_path)
