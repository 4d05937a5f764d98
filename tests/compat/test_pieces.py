"""Small things of PEFT's inside, beside PEFT's own."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import functional, import_utils
from peft.tuners.lokr.layer import factorization
from peft.utils import other
from torch import nn

from multigraft import AdapterNameError, ConfigError, LoraConfig, get_peft_model, kinds
from multigraft.compat import availability, conversions, pieces, questions
from multigraft.compat.tables import HOMES
from tests.oracle import KINDS, Net, build, graft_pair
from tests.subject import layers


@pytest.fixture
def model() -> Any:
    made = get_peft_model(build(Net), LoraConfig(r=2, target_modules=["lin0"]), "a")
    made.add_adapter("b", LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    return made


def trained(model: Any) -> set[str]:
    return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", HOMES["multigraft.compat.availability"])
def test_what_is_installed_is_told_as_peft_tells_it(name: str) -> None:
    assert getattr(availability, name)() == getattr(import_utils, name)()


@pytest.mark.parametrize("size", [1, 7, 12, 64, 360, 1000])
@pytest.mark.parametrize("limit", [-1, 4, 16])
def test_factors_are_pefts(size: int, limit: int) -> None:
    assert pieces.factorization(size, limit) == factorization(size, limit)


def test_constants_are_pefts() -> None:
    for name in HOMES["multigraft.compat.pieces"]:
        ours = getattr(pieces, name)
        if isinstance(ours, (str, list)):
            assert ours == getattr(peft.utils.constants, name)
    theirs = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    for kind, prefix in pieces.PEFT_TYPE_TO_PREFIX_MAPPING.items():
        assert prefix == theirs[peft.PeftType(str(kind))], kind


def test_set_adapter_and_set_requires_grad_take_a_handle_or_its_base(model: Any) -> None:
    pieces.set_adapter(model, "b")
    assert model.active_adapters == ["b"] and trained(model) == {"b"}
    pieces._set_adapter(model.get_base_model(), ["a", "b"], inference_mode=True)
    assert model.active_adapters == ["a", "b"] and trained(model) == set()
    pieces.set_requires_grad(model, "a")
    assert trained(model) == {"a"}
    with pytest.raises(AdapterNameError, match="called `z`"):
        pieces.set_requires_grad(model, "z")


def test_delete_adapter_tells_who_is_active_and_leaves_the_last_config_to_the_caller() -> None:
    net = get_peft_model(build(Net), LoraConfig(target_modules=["lin0"]), "a").get_base_model()
    get_peft_model(net, LoraConfig(target_modules=["lin0"]), "b")
    assert pieces.delete_adapter(net, "a", prefix="lora_") == ["b"]
    assert pieces.delete_adapter(net, "b", "lora_") is None
    assert net.peft_config == {} and net.peft_config.pop("b") is None
    assert not layers(net)


def test_an_adapters_half_precision_is_widened_as_peft_widens_it() -> None:
    pair = graft_pair(lambda: Net().half(), {"target_modules": ["lin0"], "r": 2}, fill=False)
    for model, cast in ((pair.ours, pieces), (pair.theirs, functional)):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.half()
        cast.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
        assert _dtypes(model) == {torch.float16}
        cast.cast_adapter_dtype(model, "default")
        assert _dtypes(model) == {torch.float32}


def _dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if "lora_" in n}


def test_a_module_is_found_with_its_parent_and_its_name(model: Any) -> None:
    path = "base_model.model.lin0.base_layer"
    ours, theirs = pieces._get_submodules(model, path), other._get_submodules(model, path)
    assert all(a is b for a, b in zip(ours[:2], theirs[:2], strict=True)) and ours[2] == theirs[2]
    with pytest.raises(AttributeError):
        pieces._get_submodules(model, "base_model.nowhere")


def test_a_weight_is_turned_only_where_it_is_stored_turned() -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    assert pieces.transpose(weight, False) is weight
    turned = pieces.transpose(weight, True)
    assert isinstance(turned, nn.Parameter) and torch.equal(turned, weight.T)
    assert torch.equal(pieces.transpose(weight.data, True), weight.T)


def test_the_device_is_pefts() -> None:
    assert pieces.infer_device() == other.infer_device()


class Blocks(nn.Module):
    _no_split_modules = ("Net",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Net()])


def test_fsdp_wraps_blocks_and_small_trained_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Blocks(), LoraConfig(target_modules=["lin0"]))
    policy = pieces.fsdp_auto_wrap_policy(model)
    wrapped = {n for n, m in model.named_modules() if policy(m, recurse=False, nonwrapped_numel=9)}
    blocks = {f"base_model.model.layers.{i}" for i in (0, 1)}
    pairs = {f"{b}.lin0.lora_{side}.default" for b in blocks for side in "AB"}
    assert wrapped == blocks | pairs
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Net,Nowhere")
    with pytest.raises(ConfigError, match=r"\['Nowhere'\]"):
        pieces.fsdp_auto_wrap_policy(model)


CLASSES = {
    "lin0": questions.Linear,
    "emb": questions.Embedding,
    "conv1": questions.Conv1d,
    "conv2": questions.Conv2d,
    "conv3": questions.Conv3d,
}


def test_isinstance_tells_loras_apart_by_their_base_layer() -> None:
    net = get_peft_model(build(Net), LoraConfig(target_modules=KINDS)).get_base_model()
    for path, own in CLASSES.items():
        layer = net.get_submodule(path)
        kinds_of_it = [c for c in (*CLASSES.values(), questions.Linear4bit) if isinstance(layer, c)]
        assert kinds_of_it == [own], path
    assert not isinstance(net.head, questions.Linear)
    with pytest.raises(TypeError, match="for isinstance"):
        questions.Linear(net.head)


def test_an_adapted_4_bit_layer_is_told_from_a_dense_one() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4"))
    layer = get_peft_model(net, LoraConfig(target_modules=["0"])).get_base_model()[0]
    assert isinstance(layer, questions.Linear4bit) and not isinstance(layer, questions.Linear)
    assert not isinstance(layer, questions.Linear8bitLt)


LAYERS = [name for name in HOMES["multigraft.kinds"] if name.endswith("Layer")]


@pytest.mark.parametrize("name", ["LoraLayer", *LAYERS])
def test_a_kind_of_layer_names_the_groups_that_pefts_class_names(name: str) -> None:
    method = {"LNTuningLayer": "ln_tuning", "TrainableTokensLayer": "trainable_tokens"}.get(name)
    module = getattr(peft.tuners, method or name.removesuffix("Layer").lower()).layer
    theirs, ours = getattr(module, name).adapter_layer_names, getattr(kinds, name)
    assert set(ours.adapter_layer_names) == set(theirs) - {"oft_embedding_R"}
    assert kinds.BaseTunerLayer.adapter_layer_names == ()


def test_what_is_saved_or_trained_beside_is_auxiliary() -> None:
    config = LoraConfig(
        target_modules=["lin0"], modules_to_save=["head"], trainable_token_indices={"emb": [1]}
    )
    net = get_peft_model(build(Net), config).get_base_model()
    for path, own in {
        "head": kinds.ModulesToSaveWrapper,
        "emb": kinds.TrainableTokensWrapper,
    }.items():
        assert isinstance(net.get_submodule(path), own)
        assert isinstance(net.get_submodule(path), kinds.AuxiliaryTrainingWrapper)
    assert not isinstance(net.lin0, (kinds.AuxiliaryTrainingWrapper, kinds.ParamWrapper))


def test_names_in_files_get_the_adapters_name_where_peft_puts_it() -> None:
    pairs = {
        "a.lora_A.weight": "a.lora_A.x.weight",
        "a.lora_embedding_B": "a.lora_embedding_B.x",
        "a.lora_magnitude_vector": "a.lora_magnitude_vector.x.weight",
        "a.hada_w1_a": "a.hada_w1_a.x",
        "a.ia3_l": "a.ia3_l.x",
        "a.base_layer.weight": "a.base_layer.weight",
    }
    assert {key: conversions.with_adapter(key, "x") for key in pairs} == pairs
