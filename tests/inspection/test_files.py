"""Adapters as they lie on disk."""

from __future__ import annotations

import pytest
import torch

from multigraft import CheckpointError, LoraConfig, PeftModel, get_peft_model
from multigraft.inspection import assemble, read_adapter, read_adapters
from multigraft.report import collect
from tests.inspection.adapters import net, write


def test_an_adapter_is_its_config_and_its_tensors(tmp_path):
    found = read_adapter(write(tmp_path / "dates"))
    assert (found.name, found.config.r, len(found.tensors)) == ("dates", 4, 12)
    assert found.parameters == 6 * 4 * 24
    assert found.bytes == (tmp_path / "dates" / "adapter_model.safetensors").stat().st_size
    assert not found.is_pickle


def test_a_folder_of_several_means_each_in_order(tmp_path):
    model = get_peft_model(net(), LoraConfig(target_modules=["up"]), adapter_name="b")
    model.add_adapter("a", LoraConfig(target_modules=["down"]))
    model.save_pretrained(tmp_path)
    assert [each.name for each in read_adapters([str(tmp_path)])] == ["a", "b"]
    with pytest.raises(CheckpointError, match="Adapters in its subfolders: a, b"):
        read_adapter(tmp_path)


def test_a_pickle_is_read_when_that_is_allowed_and_on_its_base_too(tmp_path):
    folder = write(tmp_path / "a")
    held = read_adapter(folder).tensors
    torch.save({f"base_model.model.{k}": t for k, t in held.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        collect([folder], base=net())
    report = collect([folder], base=net(), allow_pickle=True)
    assert len(report.adapters[0].sites) == 6


def test_adapters_are_put_together_beside_each_other(tmp_path):
    folders = [write(tmp_path / name, seed=n) for n, name in enumerate(("a", "__base__"))]
    model = assemble(folders, lambda _: net(), base="net")
    assert isinstance(model, PeftModel)
    assert list(model.peft_config) == ["a", "adapter-2"]  # that name means no adapter
