"""Trained copies of whole modules are merged tensor by tensor: buffers and inner modules too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, PeftModel, get_peft_model
from multigraft.storage import DENSE, FOREIGN, slot_of
from tests.laws import fingerprint
from tests.storage.cases import CASES


class Gate(nn.Module):
    """A parameter, a buffer and modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale + self.shift


class Doubled(nn.Linear):
    """A class whose weight means something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


MODULES = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "container": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "own tensors beside modules": Gate,
    "a forward of its own": lambda: Doubled(8, 8),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
}


def trained(module: nn.Module) -> PeftModel:
    """A model with a LoRA on `0` and a copy of `1`, every tensor of which differs from the base."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), module)
    net.train()(torch.randn(16, 8))  # running statistics
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    model = get_peft_model(net.eval(), config)
    with torch.no_grad():
        for graft in (g for x in model.base_model.layers() for g in x.grafts["default"]):
            for tensor in graft.params.values():
                change = torch.rand(tensor.shape) if tensor.is_floating_point() else 7
                tensor.add_(change)
    return model


def rows() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODULES)
def test_merging_a_copy_gives_its_outputs_and_unmerging_the_bases_bits(name):
    model = trained(MODULES[name]())
    with torch.no_grad():
        apart, before = model(rows()), fingerprint(model)
        model.merge_adapter()
        torch.testing.assert_close(model(rows()), apart)
        assert fingerprint(model) != before
        model.unmerge_adapter()
        assert fingerprint(model) == before
        assert torch.equal(model(rows()), apart)


@pytest.mark.parametrize("name", MODULES)
def test_merge_and_unload_leaves_the_copys_tensors_in_the_base(name):
    model = trained(MODULES[name]())
    base = model.get_base_model()
    wanted = {
        f"{layer.path}.{key}": tensor.clone()
        for layer in model.base_model.layers()
        for graft in layer.grafts["default"]
        if graft.stand_in is not None
        for key, tensor in graft.stand_in.state_dict().items()
    }
    assert model.merge_and_unload() is base
    state = base.state_dict()
    assert len(wanted) >= 2
    for key, tensor in wanted.items():
        assert torch.equal(state[key], tensor), key
        assert state[key].dtype is tensor.dtype, key


def test_large_counts_are_merged_exactly():
    model = trained(nn.BatchNorm1d(8))
    copy = model.get_base_model()[1].modules_to_save["default"]
    copy.num_batches_tracked.fill_(2**24 + 1)  # float32 has no such number
    model.merge_adapter()
    assert int(model.get_base_model()[1].base_layer.num_batches_tracked) == 2**24 + 1


def test_statistics_that_run_while_merged_are_gone_after_unmerging():
    model = trained(nn.BatchNorm1d(8))
    before = fingerprint(model)
    model.merge_adapter()
    model.get_base_model()[1].base_layer.train()(rows())
    model.get_base_model()[1].base_layer.eval()
    model.unmerge_adapter()
    assert fingerprint(model) == before


def test_a_second_copy_starts_from_the_bases_own_tensors_while_the_first_is_merged():
    model = trained(Gate())
    own = {k: v.clone() for k, v in model.get_base_model()[1].base_layer.state_dict().items()}
    model.merge_adapter()
    model.add_adapter("b", LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    second = model.get_base_model()[1].modules_to_save["b"].state_dict()
    assert all(torch.equal(second[key], tensor) for key, tensor in own.items())


def test_a_slot_names_the_module_that_holds_the_tensor_and_its_own_storage():
    net = nn.ModuleDict({"a": CASES["bnb-nf4"].make(64, 64), "b": Doubled(8, 8)})
    packed = slot_of(net, "a.weight")
    assert packed.layer is net["a"]
    assert packed.name == "weight"
    assert packed.storage.name == "bnb4"
    assert slot_of(net, "a.bias").storage is DENSE
    assert slot_of(net, "b.weight").storage is FOREIGN


def test_a_name_that_means_a_module_and_a_part_of_it_copies_the_module_once():
    """`1` is also the end of `1.inner.1`."""
    model = trained(Gate())
    assert [layer.path for layer in model.base_model.layers()] == ["0", "1"]


def test_a_second_adapter_with_the_same_config_takes_the_same_places():
    model = trained(Gate())
    model.add_adapter("b", model.peft_config["default"])
    held = {layer.path: sorted(layer.grafts) for layer in model.base_model.layers()}
    assert held == {"0": ["b", "default"], "1": ["b", "default"]}
