"""No graft on a graft, whatever the order of operations; and removal gives the base back.

Every case ends in parallel adapters or in a clear error that changed nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from multigraft import (
    AdaptedLayer,
    AdapterNameError,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from tests.laws import adapted_paths, fingerprint
from tests.subject import LINEAR, Subject, layers


@pytest.fixture
def subject() -> Subject:
    return Subject()


# -- many all-linear adapters ------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 10, 100])
def test_any_number_of_all_linear_adapters_stands_side_by_side_and_goes_without_a_trace(
    subject: Subject, count: int
) -> None:
    model = get_peft_model(subject.base, subject.config(), "n0")
    for index in range(1, count):
        model.add_adapter(f"n{index}", subject.config())
    subject.check()
    assert adapted_paths(subject.base) == LINEAR
    assert {tuple(sorted(x.grafts)) for x in layers(subject.base)} == {
        tuple(sorted(f"n{i}" for i in range(count)))
    }
    for name in ("n0", f"n{count - 1}"):
        model.set_adapter(name)
        torch.testing.assert_close(model(subject.ids), subject.alone(name))
    for index in range(count):
        model.delete_adapter(f"n{index}")
        subject.check()
    subject.assert_restored()


def test_the_second_all_linear_resolves_to_the_same_targets_as_the_first(subject: Subject) -> None:
    model = get_peft_model(subject.base, subject.config())
    model.add_adapter("second", subject.config())
    first, second = (model.peft_config[n].target_modules for n in ("default", "second"))
    assert first == second == ["down", "head", "up"]


def test_each_of_many_adapters_keeps_its_own_output_when_others_come_and_go(
    subject: Subject,
) -> None:
    model = get_peft_model(subject.base, subject.config(), "keeps")
    before = model(subject.ids)
    for index in range(5):
        model.add_adapter(f"x{index}", subject.config(r=1 + index))
        assert torch.equal(model(subject.ids), before)
    for index in (2, 0, 4, 1, 3):
        model.delete_adapter(f"x{index}")
        assert torch.equal(model(subject.ids), before)


# -- get_peft_model more than once -------------------------------------------------------------


def test_get_peft_model_again_with_the_same_name_is_refused_and_changes_nothing(
    subject: Subject,
) -> None:
    model = get_peft_model(subject.base, subject.config())
    before, y = fingerprint(subject.base), model(subject.ids)
    with pytest.raises(AdapterNameError, match="`default` exists"):
        get_peft_model(subject.base, subject.config())
    assert fingerprint(subject.base) == before
    assert torch.equal(model(subject.ids), y)


@pytest.mark.parametrize("through", ["base", "handle", "tuner", "handle of handle"])
def test_get_peft_model_again_with_another_name_grafts_beside_and_both_handles_agree(
    subject: Subject, through: str
) -> None:
    first = get_peft_model(subject.base, subject.config(), "a")
    held = {
        "base": subject.base,
        "handle": first,
        "tuner": first.base_model,
        "handle of handle": PeftModel(first, None),
    }[through]
    second = get_peft_model(held, subject.config(), "b")
    subject.check()
    assert first.get_base_model() is second.get_base_model() is subject.base
    for handle in (first, second):
        assert list(handle.peft_config) == ["a", "b"]
        assert handle.active_adapters == ["b"]
    assert torch.equal(first(subject.ids), second(subject.ids))
    first.set_adapter("a")
    assert second.active_adapters == ["a"]
    torch.testing.assert_close(second(subject.ids), subject.alone("a"))
    second.delete_adapter("a")
    assert list(first.peft_config) == ["b"]
    first.unload()
    assert list(second.peft_config) == []
    subject.assert_restored()


def test_a_handle_that_outlived_unload_agrees_with_the_next_one(subject: Subject) -> None:
    old = get_peft_model(subject.base, subject.config(), "a")
    old.unload()
    new = get_peft_model(subject.base, subject.config(), "b")
    assert list(old.peft_config) == ["b"]
    assert old.active_adapters == ["b"]
    old.add_adapter("c", subject.config())
    assert list(new.peft_config) == ["b", "c"]
    subject.check()
    new.unload()
    subject.assert_restored()


def test_keys_of_an_adapter_made_through_a_handle_have_no_wrapper_in_their_path(
    subject: Subject,
) -> None:
    model = get_peft_model(
        get_peft_model(subject.base, subject.config(), "a"), subject.config(), "b"
    )
    keys = get_peft_model_state_dict(model, adapter_name="b")
    paths = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in keys}
    assert sorted(paths) == LINEAR


# -- a second adapter with other targets -------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        (["up"], ["layers.0.up", "layers.1.up"]),
        (["layers.1.up", "conv"], ["conv", "layers.1.up"]),
        (r"layers\.\d+\.(up|down)", LINEAR[1:]),
        (r".*", None),
        (["emb", "head"], ["emb", "head"]),
    ],
)
def test_a_second_adapter_with_other_targets_acts_on_baselayers(
    subject: Subject, target: object, paths: list[str] | None
) -> None:
    model = get_peft_model(subject.base, subject.config())
    before = fingerprint(subject.base)
    if paths is None:  # it means the norms as well, which LoRA cannot adapt
        with pytest.raises(TargetError, match="cannot adapt"):
            model.add_adapter("second", subject.config(target))
        assert fingerprint(subject.base) == before
        return
    model.add_adapter("second", subject.config(target))
    subject.check()
    assert sorted({x.path for x in layers(subject.base) if "second" in x.grafts}) == paths
    model.unload()
    subject.assert_restored()


@pytest.mark.parametrize(
    "target",
    [
        ["lora_A"],
        ["lora_B"],
        ["base_layer"],
        ["head.base_layer"],
        ["default"],
        ["up.base_layer", "head"],
        r".*lora_A.*",
        r".*base_layer",
        r"head\.lora_A\.default",
        r"(base_model\.)?model\.head",
    ],
)
def test_names_inside_a_wrapper_match_nothing_and_the_error_says_so(
    subject: Subject, target: object
) -> None:
    model = get_peft_model(subject.base, subject.config())
    before = fingerprint(subject.base)
    with pytest.raises(TargetError, match="target_modules"):
        model.add_adapter("second", subject.config(target))
    assert fingerprint(subject.base) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("field", ["modules_to_save", "exclude_modules"])
def test_other_fields_do_not_see_into_wrappers_either(subject: Subject, field: str) -> None:
    model = get_peft_model(subject.base, subject.config())
    before = fingerprint(subject.base)
    with pytest.raises(TargetError, match=field):
        model.add_adapter("second", subject.config(**{field: ["base_layer"]}))
    assert fingerprint(subject.base) == before


def test_base_modules_that_are_called_like_wrappers_parts_are_ordinary_sites() -> None:
    base = nn.ModuleDict({"lora_A": nn.Linear(4, 4), "base_layer": nn.Linear(4, 4)})
    pristine, before = copy.deepcopy(base), fingerprint(base)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    model.add_adapter("second", LoraConfig(target_modules=["lora_A", "base_layer"]))
    assert adapted_paths(base) == ["base_layer", "lora_A"]
    assert all(sorted(x.grafts) == ["default", "second"] for x in layers(base))
    assert not any(isinstance(x.base_layer, AdaptedLayer) for x in layers(base))
    assert {x.path for x in layers(base)} <= set(dict(pristine.named_modules()))
    model.unload()
    assert fingerprint(base) == before


# -- after other operations --------------------------------------------------------------------


@pytest.mark.parametrize("through", ["add_adapter", "get_peft_model", "inject"])
def test_an_adapter_that_comes_while_another_is_merged_stands_beside_it(
    subject: Subject, through: str
) -> None:
    model = get_peft_model(subject.base, subject.config(), "a")
    model.merge_adapter()
    if through == "add_adapter":
        model.add_adapter("b", subject.config())
    elif through == "get_peft_model":
        get_peft_model(subject.base, subject.config(), "b")
    else:
        inject_adapter_in_model(subject.config(), subject.base, "b")
    subject.check()
    model.unmerge_adapter()
    for name in ("a", "b"):
        model.set_adapter(name)
        torch.testing.assert_close(model(subject.ids), subject.alone(name))
    model.unload()
    subject.assert_restored()


def test_a_copy_that_is_made_while_another_adapter_is_merged_starts_from_the_bases_own_values(
    subject: Subject,
) -> None:
    model = get_peft_model(subject.base, subject.config(bias="lora_only"), "a")
    with torch.no_grad():
        subject.base.head.bias_copy_bias["a"].add_(1.0)  # type: ignore[index, union-attr]
    model.merge_adapter()
    model.add_adapter("b", subject.config(["up"], bias="all", modules_to_save=["head"]))
    state = get_peft_model_state_dict(model, adapter_name="b")
    prefix = "base_model.model."
    for leaf in ("weight", "bias"):
        own = subject.pristine.get_parameter(f"head.{leaf}")
        assert torch.equal(state[f"{prefix}head.{leaf}"], own)
    assert torch.equal(
        state[f"{prefix}layers.0.up.base_layer.bias"], subject.pristine.layers[0].up.bias
    )


def test_after_merge_and_unload_the_merged_model_is_a_plain_base(subject: Subject) -> None:
    model = get_peft_model(subject.base, subject.config(), "a")
    y = model(subject.ids)
    merged = model.merge_and_unload()
    assert merged is subject.base
    assert adapted_paths(merged) == []
    torch.testing.assert_close(merged(subject.ids), y)
    after = fingerprint(merged)
    assert [m[:3] for m in after.modules] == [m[:3] for m in subject.before.modules]
    again = get_peft_model(merged, subject.config(), "a")
    subject.check()
    again.unload()
    assert fingerprint(merged) == after


def test_after_delete_the_same_name_and_sites_are_free_again(subject: Subject) -> None:
    model = get_peft_model(subject.base, subject.config(), "a")
    model.add_adapter("b", subject.config(["head"]))
    model.delete_adapter("a")
    subject.check()
    assert adapted_paths(subject.base) == ["head"]
    model.add_adapter("a", subject.config())
    subject.check()
    assert adapted_paths(subject.base) == LINEAR
    model.unload()
    subject.assert_restored()


def test_a_loaded_adapter_stands_beside_and_loading_over_it_does_not_nest(
    subject: Subject, tmp_path: object
) -> None:
    model = get_peft_model(subject.base, subject.config(), "a")
    model.save_pretrained(str(tmp_path))
    for name in ("b", "b", "a"):
        model.load_adapter(f"{tmp_path}/a", name)
        subject.check()
    for name in ("a", "b"):
        model.set_adapter(name)
        torch.testing.assert_close(model(subject.ids), subject.alone("a"))
    model.unload()
    subject.assert_restored()


def test_from_pretrained_on_an_adapted_model_stands_beside(
    subject: Subject, tmp_path: object
) -> None:
    first = get_peft_model(subject.base, subject.config(), "a")
    first.save_pretrained(str(tmp_path))
    for held, name in ((subject.base, "b"), (first, "c")):
        PeftModel.from_pretrained(held, f"{tmp_path}/a", name)
        subject.check()
    assert list(first.peft_config) == ["a", "b", "c"]
    assert adapted_paths(subject.base) == LINEAR
