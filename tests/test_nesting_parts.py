"""No graft on a graft where models are parts of each other, or carry something else.

Saved modules and their insides, handles, shared layers, parts and wholes, layers of PEFT.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from multigraft import (
    AdaptedLayer,
    LoraConfig,
    MultigraftError,
    NestingError,
    PeftModel,
    TargetError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from tests.laws import Fingerprint, adapted_paths, assert_side_by_side, fingerprint
from tests.subject import LINEAR, Subject, layers


@pytest.fixture
def subject() -> Subject:
    return Subject()


# -- saved modules -----------------------------------------------------------------------------


def test_a_saved_module_and_a_lora_share_one_wrapper_in_either_order(subject: Subject) -> None:
    saved = subject.config(["up"], modules_to_save=["head"])
    for first, second in ((saved, subject.config()), (subject.config(), saved)):
        model = get_peft_model(subject.base, first, "a")
        model.add_adapter("b", second)
        subject.check()
        assert sorted(subject.base.head.grafts) == ["a", "b"]  # type: ignore[union-attr, arg-type]
        model.unload()
        subject.assert_restored()


def test_all_linear_does_not_reach_into_another_adapters_saved_copy(subject: Subject) -> None:
    model = get_peft_model(subject.base, subject.config(["up"], modules_to_save=["layers.0"]), "a")
    model.add_adapter("b", subject.config())
    subject.check()
    assert sorted({x.path for x in layers(subject.base) if "b" in x.grafts}) == LINEAR
    model.set_adapter("b")
    torch.testing.assert_close(model(subject.ids), subject.alone("b"))


class Gated(nn.Module):
    """A parameter of its own beside a linear layer, so that it can only be saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gate


@pytest.mark.parametrize("target", ["all-linear", ["inner"], r"gated\.inner"])
def test_a_target_inside_a_module_that_another_adapter_saves_whole_is_a_clear_error(
    target: object,
) -> None:
    base = nn.Sequential()
    base.gated, base.out = Gated(), nn.Linear(4, 4)
    model = get_peft_model(base, LoraConfig(target_modules=["out"], modules_to_save=["gated"]), "a")
    before = fingerprint(base)
    with pytest.raises(TargetError, match=r"gated.*`a`"):
        model.add_adapter("b", LoraConfig(target_modules=target))  # type: ignore[arg-type]
    assert fingerprint(base) == before


def test_a_module_with_an_adapted_part_cannot_be_saved_whole() -> None:
    base = nn.Sequential()
    base.gated, base.out = Gated(), nn.Linear(4, 4)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"), "a")
    before = fingerprint(base)
    with pytest.raises(TargetError, match="gated"):
        model.add_adapter("b", LoraConfig(target_modules=["out"], modules_to_save=["gated"]))
    assert fingerprint(base) == before


# -- inject_adapter_in_model -------------------------------------------------------------------


def test_injecting_twice_gives_parallel_adapters(subject: Subject) -> None:
    assert inject_adapter_in_model(subject.config(), subject.base, "a") is subject.base
    inject_adapter_in_model(subject.config(), subject.base, "b")
    subject.check()
    handle = PeftModel(subject.base, None)
    assert list(handle.peft_config) == ["a", "b"]
    torch.testing.assert_close(subject.base(subject.ids), subject.alone("b"))
    handle.unload()
    subject.assert_restored()


@pytest.mark.parametrize("is_empty", [False, True])
def test_injecting_into_a_handle_means_its_base(subject: Subject, is_empty: bool) -> None:
    handle = get_peft_model(subject.base, subject.config(), "a")
    if is_empty:
        handle.delete_adapter("a")
    assert inject_adapter_in_model(subject.config(), handle, "b") is handle
    subject.check()
    assert list(handle.peft_config) == (["b"] if is_empty else ["a", "b"])
    assert adapted_paths(subject.base) == LINEAR
    handle.unload()
    subject.assert_restored()


def test_injecting_by_a_state_dict_of_a_handle_adapts_base_paths(subject: Subject) -> None:
    handle = get_peft_model(subject.base, subject.config(["up"]), "a")
    state = get_peft_model_state_dict(handle, adapter_name="a")
    inject_adapter_in_model(subject.config(), subject.base, "b", state_dict=state)
    subject.check()
    assert sorted({x.path for x in layers(subject.base) if "b" in x.grafts}) == [
        "layers.0.up",
        "layers.1.up",
    ]


# -- parts, wholes and strangers ---------------------------------------------------------------


def _refused(subject: Subject, model: nn.Module, error: type[MultigraftError], match: str) -> None:
    before: Fingerprint = fingerprint(subject.base)
    for adapt in (
        lambda: get_peft_model(model, subject.config(), "x"),
        lambda: inject_adapter_in_model(subject.config(), model, "x"),
    ):
        with pytest.raises(error, match=match):
            adapt()
        assert fingerprint(subject.base) == before


def test_a_part_that_is_adapted_through_a_root_of_its_own_is_not_adapted_through_the_whole(
    subject: Subject,
) -> None:
    part = get_peft_model(subject.base.layers[0], subject.config(), "a")
    _refused(subject, subject.base, NestingError, "through a PeftModel of its own")
    part.unload()
    get_peft_model(subject.base, subject.config(), "x").unload()
    subject.assert_restored()


def test_a_part_of_an_adapted_whole_is_not_adapted_by_itself(subject: Subject) -> None:
    whole = get_peft_model(subject.base, subject.config(), "a")
    _refused(subject, subject.base.layers[0], NestingError, "through the same root")
    whole.unload()
    subject.assert_restored()


@pytest.mark.parametrize("part", ["", ".base_layer", ".lora_A", ".lora_A.a"])
def test_an_adapted_layer_and_its_insides_are_no_model_to_adapt(
    subject: Subject, part: str
) -> None:
    get_peft_model(subject.base, subject.config(["layers.0.up"]), "a")
    target = subject.base.get_submodule(f"layers.0.up{part}")
    before = fingerprint(subject.base)
    for names in ("all-linear", ["base_layer"], [""], r".*"):
        with pytest.raises((MultigraftError, ValueError)):
            get_peft_model(target, subject.config(names), "x")
        assert fingerprint(subject.base) == before


def test_a_saved_copy_is_no_model_to_adapt() -> None:
    base = nn.Sequential()
    base.gated, base.out = Gated(), nn.Linear(4, 4)
    config = LoraConfig(target_modules=["out"], modules_to_save=["gated"])
    get_peft_model(base, config, "a")
    copied = base.gated.modules_to_save["a"]  # type: ignore[index, union-attr]
    for inside in (copied, base.gated.base_layer):  # type: ignore[union-attr]
        before = fingerprint(base)
        try:
            get_peft_model(inside, LoraConfig(target_modules="all-linear"), "x")
        except MultigraftError:
            assert fingerprint(base) == before
        # Where a bare module cannot know what holds it, the whole refuses to go on with it.
        else:
            with pytest.raises(NestingError):
                get_peft_model(base, LoraConfig(target_modules=["out"]), "y")


def test_an_adapted_layer_refuses_to_be_put_into_another(subject: Subject) -> None:
    get_peft_model(subject.base, subject.config(), "a")
    layer = subject.base.head
    assert isinstance(layer, AdaptedLayer)
    for inner in (layer, nn.Sequential(layer)):
        with pytest.raises(NestingError, match="side by side"):
            AdaptedLayer(inner, "head", layer.roster)


def test_a_model_with_adapters_inside_another_model_is_refused_until_they_are_unloaded(
    subject: Subject,
) -> None:
    handle = get_peft_model(subject.base, subject.config(), "a")
    outer = nn.Sequential(handle)
    with pytest.raises(NestingError):
        get_peft_model(outer, subject.config(), "x")
    handle.unload()
    model = get_peft_model(outer, subject.config(), "x")
    model.unload()
    subject.assert_restored()


@pytest.mark.parametrize("how", ["lora", "saved module", "injected"])
def test_a_model_that_carries_pefts_layers_is_refused_with_the_remedy(
    subject: Subject, how: str
) -> None:
    config = peft.LoraConfig(target_modules=["layers.0.up"])
    if how == "saved module":
        config.modules_to_save = ["head"]
    if how == "injected":
        theirs = peft.inject_adapter_in_model(config, subject.base)
        remedy = None
    else:
        theirs = peft.get_peft_model(subject.base, config)
        remedy = theirs.unload
    for model in (subject.base, theirs):
        _refused(subject, model, NestingError, r"unload\(\)")
    if remedy is not None:
        remedy()
        model = get_peft_model(subject.base, subject.config())
        subject.check()
        model.unload()
        assert fingerprint(subject.base).bits == subject.before.bits


def test_a_peft_layer_itself_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), base)
    with pytest.raises(NestingError, match=r"unload\(\)"):
        get_peft_model(base[0], LoraConfig(target_modules=["base_layer"]))


def test_a_shared_layer_gets_one_wrapper_at_all_its_places() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    base[2] = base[0]
    pristine, before = copy.deepcopy(base), fingerprint(base)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    model.add_adapter("second", LoraConfig(target_modules=["2"]))
    assert_side_by_side(base, pristine)
    assert base[0] is base[2]
    assert adapted_paths(base) == ["0", "2"]
    model.delete_adapter("default")
    assert base[0] is base[2]
    model.delete_adapter("second")
    assert fingerprint(base) == before
