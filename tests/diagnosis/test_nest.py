"""Checkpoints of nested models: the nest is shown, named, and made plain with equal outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Conv1d as PeftConv1d
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import save_file
from torch import Tensor

import multigraft
from multigraft import PeftModel, doctor
from tests.diagnosis.files import PREFIX, SETTINGS, WEIGHTS, resettle, settings, tensors, the
from tests.weaknesses import nets

IDS = nets.ids()
OUTER = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]}
INNER = {"r": 2, "lora_alpha": 6, "target_modules": ["head"]}


def nest(outer: dict[str, Any] = OUTER, inner: dict[str, Any] = INNER, depth: int = 1) -> Any:
    """PEFT's model whose second adapter was put onto the first one's matrices, layer by layer.

    That is what PEFT did when the second was asked for with "all-linear". Deeper, a third is on
    the second's.
    """
    model = peft.get_peft_model(nets.net(), peft.LoraConfig(**outer))
    names = ["second", "third"][:depth]
    for name in names:
        model.add_adapter(name, peft.LoraConfig(**inner))
    for block in model.base_model.model.blocks:
        for layer in (block.up, block.down):
            wrap(layer, "default", names, model)
    if "conv" in outer["target_modules"]:
        wrap(model.base_model.model.conv, "default", names, model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def wrap(layer: Any, name: str, inside: list[str], model: Any) -> None:
    """Put the first of ``inside`` onto the matrices of ``name``, and the next onto its own."""
    if not inside:
        return
    first, *more = inside
    config = model.peft_config[first]
    kind = PeftConv1d if isinstance(layer, PeftConv1d) else PeftLinear
    for group in (layer.lora_A, layer.lora_B):
        options = {"r": config.r, "lora_alpha": config.lora_alpha, "config": config}
        group[name] = kind(group[name], first, **options)
        wrap(group[name], first, more, model)


def output(model: Any, *active: str) -> Tensor:
    model.base_model.set_adapter(list(active))
    with torch.no_grad():
        return model.eval()(IDS)


def all_tensors(model: Any) -> dict[str, Tensor]:
    """What PEFT's model holds of its adapters, under the names in memory."""
    return {key: t.clone() for key, t in model.state_dict().items() if ".lora_" in key}


def as_older_peft_saved(model: Any, name: str) -> dict[str, Tensor]:
    """Every key in which the adapter's name stands, without the name."""
    held = all_tensors(model)
    return {k.replace(f".{name}", ""): t for k, t in held.items() if f".{name}" in k}


def save(model: Any, folder: Path, held: dict[str, Tensor] | None = None) -> Path:
    """PEFT's own folder; with other tensors in it, if given."""
    model.save_pretrained(folder)
    if held is not None:
        save_file(held, folder / WEIGHTS, {"format": "pt"})
    return folder


def loaded(folder: Path, *others: str) -> Any:
    """Our model with the adapter, and with the others beside it."""
    model = PeftModel.from_pretrained(nets.net(), folder)
    for name in others:
        model.load_adapter(folder / name, name)
    return model


def test_inspect_shows_the_nest_that_is_mended_here() -> None:
    found = multigraft.inspect(nest())
    assert len(found.nested) == 8
    assert f"{PREFIX}blocks.0.up.lora_A.default" in found.nested
    assert "NESTED lora_B.default" in str(found)


LAYOUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "names in memory": all_tensors,
    "older PEFT": lambda model: as_older_peft_saved(model, "default"),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_the_nest_is_found_and_named(layout: str, tmp_path: Path) -> None:
    model = nest()
    found = doctor(save(model, tmp_path, LAYOUTS[layout](model)), adapter_name="default")
    finding = the(found, "nested adapters")
    assert "of a model with adapters inside adapters" in finding.problem
    assert "--un-nest" in finding.remedy
    assert finding.is_fixable


@layouts
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_was_inside_is_folded_in_with_equal_outputs(
    layout: str, use_rslora: bool, tmp_path: Path
) -> None:
    model = nest(inner=INNER | {"use_rslora": use_rslora})
    folder = save(model, tmp_path, LAYOUTS[layout](model))
    found = doctor(folder, nets.net(), un_nest=True, adapter_name="default")
    assert found.is_healthy, str(found)
    assert "what `second` adds inside the adapter is in its own matrices now" in found.done[0]
    mended = loaded(folder, "second")
    wanted = output(model, "default", "second")
    torch.testing.assert_close(output(mended, "default", "second"), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, output(model, "second"), atol=0.1)
    assert tensors(folder)[f"{PREFIX}blocks.0.up.lora_A.weight"].shape == (4, 8)


def test_what_is_mended_loads_in_peft_as_well(tmp_path: Path) -> None:
    model = nest()
    folder = save(model, tmp_path, all_tensors(model))
    doctor(folder, un_nest=True, adapter_name="default")
    theirs = peft.PeftModel.from_pretrained(nets.net(), folder)
    theirs.load_adapter(folder / "second", "second")
    wanted = output(model, "default", "second")
    mended = output(theirs, "default", "second")
    torch.testing.assert_close(mended, wanted, rtol=1e-5, atol=1e-5)
    assert not multigraft.inspect(theirs).nested


def test_a_nest_in_a_convolution_is_folded(tmp_path: Path) -> None:
    model = nest(outer=OUTER | {"target_modules": ["up", "down", "conv"]})
    folder = save(model, tmp_path, all_tensors(model))
    found = doctor(folder, nets.net(), un_nest=True, adapter_name="default")
    assert found.is_healthy, str(found)
    wanted = output(model, "default", "second")
    mended = output(loaded(folder, "second"), "default", "second")
    torch.testing.assert_close(mended, wanted, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(wanted, output(model, "default"), atol=0.1)


def test_a_nest_in_a_nest_is_folded_from_the_inside(tmp_path: Path) -> None:
    model = nest(depth=2)
    folder = save(model, tmp_path, all_tensors(model))
    found = doctor(folder, un_nest=True, adapter_name="default")
    assert found.is_healthy, str(found)
    mended = loaded(folder, "second", "third")
    names = ("default", "second", "third")
    torch.testing.assert_close(output(mended, *names), output(model, *names), rtol=1e-5, atol=1e-4)


@layouts
def test_what_was_inside_is_left_out_on_request_with_the_outputs_of_one_alone(
    layout: str, tmp_path: Path
) -> None:
    model = nest()
    folder = save(model, tmp_path, LAYOUTS[layout](model))
    found = doctor(folder, drop_nested=True, adapter_name="default")
    assert found.is_healthy, str(found)
    assert (
        "is left out. Outputs are those of the nest with the adapter active alone" in found.done[0]
    )
    wanted = output(model, "default")
    torch.testing.assert_close(output(loaded(folder), "default"), wanted, rtol=1e-5, atol=1e-5)


def test_what_peft_saves_of_a_nest_today_is_made_plain(tmp_path: Path) -> None:
    model = nest()
    folder = save(model, tmp_path)
    assert f"{PREFIX}blocks.0.up.lora_A.default.base_layer.weight" in tensors(folder)
    found = doctor(folder, un_nest=True)
    assert found.is_healthy, str(found)
    assert "holds nothing of what was inside" in found.done[0]
    wanted = output(model, "default")
    torch.testing.assert_close(output(loaded(folder), "default"), wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_models_state_is_mended_in_one_go(tmp_path: Path) -> None:
    model = nest()
    held = {key: t.clone() for key, t in model.state_dict().items()}
    folder = save(model, tmp_path, held)
    found = doctor(folder, nets.net(), un_nest=True, fix=True, adapter_name="default")
    assert found.is_healthy, str(found)
    assert len(tensors(folder)) == 8
    wanted = output(model, "default", "second")
    mended = output(loaded(folder, "second"), "default", "second")
    torch.testing.assert_close(mended, wanted, rtol=1e-5, atol=1e-5)


def below_base_layers(model: Any) -> dict[str, Tensor]:
    """An adapter as it was saved where it lay in the base layers of another one's wrappers."""
    held = peft.get_peft_model_state_dict(model)
    return {key.replace(".lora_", ".base_layer.lora_"): t.clone() for key, t in held.items()}


def test_an_adapter_below_base_layers_moves_up(tmp_path: Path) -> None:
    model = peft.get_peft_model(nets.net(), peft.LoraConfig(**OUTER, init_lora_weights=False))
    folder = save(model, tmp_path, below_base_layers(model))
    found = doctor(folder, nets.net(), un_nest=True)
    assert found.is_healthy, str(found)
    assert found.done[0].startswith("moved the pairs of 4 sites up from below base layers")
    torch.testing.assert_close(output(loaded(folder), "default"), output(model, "default"))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pairs_on_two_levels_of_one_layer_are_stacked(use_rslora: bool, tmp_path: Path) -> None:
    options = OUTER | {"use_rslora": use_rslora, "init_lora_weights": False}
    models = [peft.get_peft_model(nets.net(), peft.LoraConfig(**options)) for _ in range(2)]
    held = below_base_layers(models[0]) | peft.get_peft_model_state_dict(models[1])
    folder = save(models[1], tmp_path, {key: t.clone() for key, t in held.items()})
    found = doctor(folder, nets.net(), un_nest=True)
    assert found.is_healthy, str(found)
    assert "stacked the pairs of 4 sites" in " ".join(found.done)
    both = models[1]
    both.add_adapter("other", peft.LoraConfig(**options))
    peft.set_peft_model_state_dict(both, peft.get_peft_model_state_dict(models[0]), "other")
    wanted = output(both, "default", "other")
    torch.testing.assert_close(output(loaded(folder), "default"), wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_inside_a_trained_copy_is_folded_into_it(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    model = peft.get_peft_model(nets.net(), config)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    config.save_pretrained(tmp_path)
    held = {k: t.clone() for k, t in model.state_dict().items() if "default" in k}
    save_file(held, tmp_path / WEIGHTS)
    found = doctor(tmp_path, un_nest=True, fix=True, adapter_name="default")
    assert found.is_healthy, str(found)
    head = model.base_model.model.head.modules_to_save["default"]
    wanted = head.base_layer.weight + head.get_delta_weight("b")
    torch.testing.assert_close(tensors(tmp_path)[f"{PREFIX}head.weight"], wanted.detach())


def test_dropout_is_named_as_the_difference(tmp_path: Path) -> None:
    model = nest(inner=INNER | {"lora_dropout": 0.1})
    found = doctor(save(model, tmp_path, all_tensors(model)), un_nest=True, adapter_name="default")
    assert any(
        "in training, the nest dropped elements inside as well" in each for each in found.done
    )


def test_half_precision_is_widened_so_that_what_was_inside_is_not_lost(tmp_path: Path) -> None:
    model = nest().to(torch.bfloat16)
    folder = save(model, tmp_path, all_tensors(model))
    doctor(folder, un_nest=True, adapter_name="default")
    assert tensors(folder)[f"{PREFIX}blocks.0.up.lora_A.weight"].dtype == torch.float32


# Where algebra does not allow it, nothing is written.


def refused(folder: Path, **options: Any) -> str:
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = doctor(folder, un_nest=True, **options)
    assert not found.done
    assert not found.is_healthy
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    first = found.findings[0]
    assert first.law == "nested adapters"
    return f"{first.problem} {first.remedy}"


def test_without_the_config_of_what_is_inside_its_scale_is_asked_for(tmp_path: Path) -> None:
    model = nest()
    folder = save(model, tmp_path / "a", all_tensors(model))
    (folder / "second" / SETTINGS).rename(tmp_path / SETTINGS)
    message = refused(folder, adapter_name="default")
    assert "the scale of `second`, which is nested, stands in its own config" in message
    assert "--nested DIR" in message
    assert doctor(folder, un_nest=True, adapter_name="default", nested=[tmp_path]).is_healthy


def test_the_config_of_another_adapter_is_not_taken_for_that_of_what_is_inside(
    tmp_path: Path,
) -> None:
    model = nest()
    folder = save(model, tmp_path, all_tensors(model))
    resettle(folder / "second", r=3)
    message = refused(folder, adapter_name="default")
    assert "has rank 2 there, and the config that was found for it says 3" in message


def test_what_was_put_on_an_adapter_cannot_be_mended_without_that_adapter(tmp_path: Path) -> None:
    model = nest()
    held = as_older_peft_saved(model, "second")
    save(model, tmp_path)
    save_file(held, tmp_path / "second" / WEIGHTS)
    message = refused(tmp_path / "second", adapter_name="default")
    assert "holds what was put onto this layer, and not the layer" in message
    assert "Un-nest the checkpoint of the adapter that the layer belongs to" in message


@pytest.mark.parametrize("values", [{"use_dora": True}, {"alora_invocation_tokens": [1]}], ids=str)
def test_what_is_more_than_a_plain_pair_is_not_folded(
    values: dict[str, Any], tmp_path: Path
) -> None:
    model = nest()
    folder = save(model, tmp_path, all_tensors(model))
    resettle(folder / "second", **values)
    assert "`second`, which is nested, is no plain LoRA" in refused(folder, adapter_name="default")


def test_dora_inside_is_no_plain_pair(tmp_path: Path) -> None:
    model = nest()
    held = all_tensors(model)
    inside = f"{PREFIX}blocks.0.up.lora_A.default."
    held[f"{inside}lora_magnitude_vector.second.weight"] = torch.ones(4)
    message = refused(save(model, tmp_path, held), adapter_name="default")
    assert "holds lora_A, lora_B, lora_magnitude_vector; only a plain low-rank pair" in message


def test_several_adapters_in_one_file_must_be_told_apart(tmp_path: Path) -> None:
    model = nest()
    message = refused(save(model, tmp_path, all_tensors(model)))
    assert "tensors of several adapters, `default`, `second`" in message
    assert "--adapter NAME" in message


def test_a_nest_of_another_method_is_left_with_the_reason(tmp_path: Path) -> None:
    model = nest()
    folder = save(model, tmp_path, all_tensors(model))
    resettle(folder, peft_type="LOHA")
    assert "is mended for LoRA alone" in refused(folder, adapter_name="default")


def test_several_parameters_of_one_module_are_no_nest(tmp_path: Path) -> None:
    model = peft.get_peft_model(nets.net(), peft.LoraConfig(**OUTER, init_lora_weights=False))
    folder = save(model, tmp_path, below_base_layers(model))
    resettle(folder, target_modules=[], target_parameters=["up.weight", "down.weight"])
    assert not [f for f in doctor(folder).findings if f.law == "nested adapters"]


def test_a_plain_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    model = peft.get_peft_model(nets.net(), peft.LoraConfig(**OUTER, init_lora_weights=False))
    folder = save(model, tmp_path)
    before = (folder / WEIGHTS).read_bytes(), settings(folder)
    found = doctor(folder, un_nest=True)
    assert found.is_healthy
    assert not found.done
    assert ((folder / WEIGHTS).read_bytes(), settings(folder)) == before
