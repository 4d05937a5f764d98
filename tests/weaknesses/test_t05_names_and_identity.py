"""T5, T16, T17, T26: names are names; what a thing is follows from the object, never from a string.

PEFT 0.21.2: with adapters "default" and "mlp" on a Llama, saving "default" drops every key under
`mlp.`; a module `flora_enc` keeps a deleted adapter; `add_adapter("v1.0", ...)` raises KeyError.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multigraft import (
    AdapterNameError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "conv", "embed"], modules_to_save=["head"])
NAMES = [
    "v1.0",
    "keys",
    "items",
    "weight",
    "bias",
    "training",
    "base_layer",
    "lora_A",
    "modules_to_save",
    "forward",
    "up",
    "blocks",
    "head",
    "model",
    "a b",
    "50%",
    "%2E",
    "ключ",
    "日本.語",
    "0",
    "_parameters",
]
REFUSED = [
    "",
    " ",
    ".",
    "..",
    "...",
    "a/b",
    "a\\b",
    "/",
    "a\0",
    "a\nb",
    "__base__",
    "__x",
    "x" * 201,
]
awkward = pytest.mark.parametrize("name", NAMES)


@awkward
def test_t26_any_name_goes_through_add_save_and_load(name: str, tmp_path: Path) -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name=name)
    nets.train_by_hand(model, name)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(nets.net(), tmp_path, adapter_name=name)
    assert fresh.active_adapters == [name]
    torch.testing.assert_close(fresh(nets.ids()), model(nets.ids()))
    assert len(list(tmp_path.iterdir())) == 2  # its folder and the card


@awkward
def test_t26_any_name_is_absent_from_the_files_keys(name: str, tmp_path: Path) -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="plain")
    model.add_adapter(name, CONFIG)
    model.save_pretrained(tmp_path)
    plain = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    other = load_file(tmp_path / name / "adapter_model.safetensors")
    assert set(plain) == set(other)
    assert len(plain) == 2 * 4 + 2


@awkward
def test_t26_any_name_goes_through_merge_mixed_batch_and_delete(name: str) -> None:
    bits = nets.base_bits(nets.net())
    model = get_peft_model(nets.net(), CONFIG, adapter_name="plain")
    model.add_adapter(name, CONFIG)
    nets.train_by_hand(model, "plain", name)
    rows = nets.ids(3)
    mixed = model(rows, adapter_names=[name, "plain", "__base__"])
    model.set_adapter(name)
    alone = model(rows)
    torch.testing.assert_close(mixed[:1], alone[:1])
    model.merge_adapter([name])
    torch.testing.assert_close(model(rows), alone)
    model.delete_adapter(name)
    assert list(model.peft_config) == ["plain"]
    model.delete_adapter("plain")
    nets.assert_bits(model.get_base_model(), bits)


@awkward
def test_t26_any_name_is_trained_and_found_by_named_parameters(name: str) -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name=name)
    model(nets.ids()).sum().backward()
    own = {id(p) for _, p in nets.own_parameters(model, name)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert model.peft_config[name].r == 2
    assert list(nets.layer(model, "blocks.0.up").lora_A.keys()) == [name]


@awkward
def test_t26_every_parameter_of_any_name_is_reached_by_its_own_name(name: str) -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name=name)
    for path, parameter in model.named_parameters():
        assert model.get_parameter(path) is parameter
    model.load_state_dict(model.state_dict())
    twin = get_peft_model(nets.net(1), CONFIG, adapter_name=name)
    twin.load_state_dict(model.state_dict())
    assert nets.same_bits(twin(nets.ids()), model(nets.ids()))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject", "load"])
def test_t26_a_name_that_breaks_a_path_is_refused_and_named(
    name: str, how: str, tmp_path: Path
) -> None:
    model = get_peft_model(nets.net(), CONFIG)
    model.save_pretrained(tmp_path)
    plain = nets.net()
    before, plain_before = nets.known(model), nets.known(plain)
    with pytest.raises(AdapterNameError) as caught:
        if how == "get_peft_model":
            get_peft_model(plain, CONFIG, adapter_name=name)
        elif how == "add_adapter":
            model.add_adapter(name, CONFIG)
        elif how == "inject":
            inject_adapter_in_model(CONFIG, plain, adapter_name=name)
        else:
            model.load_adapter(tmp_path, name)
    assert f"adapter name (={name[:40]!r})" in str(caught.value)
    nets.assert_as_before(model, before)
    nets.assert_as_before(plain, plain_before)


@pytest.mark.parametrize("name", [None, 3, ["a"], b"a"])
def test_t26_a_name_that_is_no_string_is_refused(name: object) -> None:
    with pytest.raises(AdapterNameError, match=r"must be a string"):
        get_peft_model(nets.net(), CONFIG, adapter_name=name)  # type: ignore[arg-type]


def test_t26_a_name_that_no_file_system_can_hold_is_refused() -> None:
    with pytest.raises(AdapterNameError, match="adapter name"):
        get_peft_model(nets.net(), CONFIG, adapter_name="\ud800")


def test_t26_an_existing_name_is_refused_with_the_way_out() -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    before = nets.known(model)
    with pytest.raises(AdapterNameError, match=r"adapter `a` exists.*delete_adapter\('a'\)"):
        model.add_adapter("a", CONFIG)
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_t26_loading_over_keeps_the_parameters_that_an_optimizer_holds(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(model, "default", seed=1)
    model.save_pretrained(tmp_path)
    model.to(dtype)
    held = [p for p in model.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in held]
    nets.train_by_hand(model, "default", seed=2)
    model.load_adapter(tmp_path, "default")
    after = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in after] == [id(p) for p in held]
    assert all(nets.same_bits(p, q) for p, q in zip(after, saved, strict=True))


@pytest.mark.parametrize("name", ["up", "blocks", "blocks.0", "lora_A", "weight"])
def test_t05_an_adapter_named_like_a_module_takes_nothing_from_the_others(name: str) -> None:
    model = get_peft_model(nets.net(), CONFIG)
    alone = set(get_peft_model_state_dict(model))
    model.add_adapter(name, CONFIG)
    assert set(get_peft_model_state_dict(model)) == alone
    assert set(get_peft_model_state_dict(model, adapter_name=name)) == alone


class Twice(nn.Module):
    """One layer of each kind under two names, and names that look like an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.embed = nn.Embedding(7, 8)
        self.tokens = self.embed
        self.flora_enc = nn.ModuleDict({"lora_A": nn.Linear(8, 8), "base_layer": nn.Linear(8, 8)})
        self.modules_to_save = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids) + self.tokens(ids))
        x = self.flora_enc["base_layer"](self.flora_enc["lora_A"](x))
        return self.modules_to_save(self.second(x))


def twice() -> Twice:
    torch.manual_seed(0)
    return Twice().eval()


IDS = torch.tensor([[1, 2, 6], [0, 3, 3]])


@pytest.mark.parametrize(
    "targets", [["first"], ["second"], ["first", "second"], ["tokens", "first"], r"second|embed"]
)
def test_t16_a_shared_module_is_wrapped_once_under_both_names(targets: list[str] | str) -> None:
    model = get_peft_model(twice(), LoraConfig(r=2, target_modules=targets))
    root = model.get_base_model()
    assert root.first is root.second
    assert root.embed is root.tokens
    nets.never_nested(model)
    nets.train_by_hand(model, "default")
    before = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), before)
    bits = nets.base_bits(twice())
    nets.assert_bits(model.unload(), bits)
    assert type(root.first) is nn.Linear
    assert root.first is root.second


def test_t16_a_shared_module_is_saved_once_and_loads_onto_either_name(tmp_path: Path) -> None:
    model = get_peft_model(twice(), LoraConfig(r=2, target_modules=["first", "second"]))
    nets.train_by_hand(model, "default")
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.first.lora_{x}.weight" for x in "AB"}
    fresh = PeftModel.from_pretrained(twice(), tmp_path)
    assert nets.same_bits(fresh(IDS), model(IDS))


def test_t16_excluding_a_shared_module_by_either_name_excludes_it() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["second"])
    model = get_peft_model(twice(), config)
    assert type(model.get_base_model().first) is nn.Linear


ODD = ["flora_enc.lora_A", "flora_enc.base_layer", "modules_to_save"]


@pytest.mark.parametrize("targets", ["all-linear", ODD, ["lora_A"], r".*base_layer|.*lora_A"])
def test_t17_base_modules_with_names_of_adapter_parts_are_ordinary_modules(
    targets: list[str] | str, tmp_path: Path
) -> None:
    bits = nets.base_bits(twice())
    model = get_peft_model(twice(), LoraConfig(r=2, target_modules=targets), adapter_name="a")
    paths = {x.path for x in model.roster.layers["a"]}
    model.add_adapter("b", LoraConfig(r=2, target_modules=targets))
    assert {x.path for x in model.roster.layers["b"]} == paths
    nets.never_nested(model)
    nets.train_by_hand(model, "a", "b")
    model.set_adapter("b")
    output = model(IDS)
    model.save_pretrained(tmp_path)
    model.delete_adapter("a")
    assert nets.same_bits(model(IDS), output)
    fresh = PeftModel.from_pretrained(twice(), tmp_path / "b")
    assert nets.same_bits(fresh(IDS), output)
    nets.assert_bits(model.unload(), bits)


def test_t17_deleting_takes_the_adapter_out_of_every_layer_whatever_its_path() -> None:
    model = get_peft_model(twice(), LoraConfig(r=2, target_modules="all-linear"), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=ODD))
    model.set_adapter("b")
    model.delete_adapter("b")
    assert not nets.own_parameters(model, "b")
    assert all(x.active_adapters == ["a"] for x in model.roster.layers["a"])


def test_t17_injecting_from_a_state_dict_reads_paths_that_look_like_adapters() -> None:
    config = LoraConfig(r=2, target_modules=[*ODD, "first"])
    trained = get_peft_model(twice(), config)
    nets.train_by_hand(trained, "default")
    state = get_peft_model_state_dict(trained)
    fresh = inject_adapter_in_model(LoraConfig(r=2), twice(), state_dict=state)
    set_peft_model_state_dict(fresh, state)
    assert nets.same_bits(fresh(IDS), trained(IDS))


def test_t17_injecting_from_a_state_dict_takes_a_saved_module_for_what_it_is() -> None:
    config = LoraConfig(r=2, target_modules=["first"], modules_to_save=["flora_enc.lora_A"])
    trained = get_peft_model(twice(), config)
    nets.train_by_hand(trained, "default")
    state = get_peft_model_state_dict(trained)
    own = LoraConfig(r=2, modules_to_save=["flora_enc.lora_A"])
    fresh = inject_adapter_in_model(own, twice(), state_dict=state)
    set_peft_model_state_dict(fresh, state)
    assert nets.same_bits(fresh(IDS), trained(IDS))


def test_t17_base_names_that_hold_a_compilers_infix_keep_it(tmp_path: Path) -> None:
    def odd() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("my_orig_mod", nn.Sequential(nn.Linear(4, 4)))
        return model

    model = get_peft_model(odd(), LoraConfig(r=2, target_modules="all-linear"))
    nets.train_by_hand(model, "default")
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(odd(), tmp_path)
    x = torch.randn(2, 4)
    assert nets.same_bits(fresh(x), model(x))
