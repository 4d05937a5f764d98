"""`multigraft.helpers`: scalings for a block, signatures, and what scripts of PEFT's import."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.helpers
import pytest
import torch
from torch import nn

from multigraft import (
    AdapterNameError,
    ConfigError,
    IA3Config,
    LoraConfig,
    PeftModel,
    StateError,
    UnsupportedError,
    get_peft_model,
    helpers,
    inject_adapter_in_model,
)
from tests.oracle import KINDS, Net, Pair, add_to_both, build, graft_pair, inputs, llama, output

CONFIG = {"target_modules": KINDS, "r": 4, "lora_alpha": 6, "rank_pattern": {"lin0": 2}}


def pair(**more: Any) -> Pair:
    made = graft_pair(Net, {**CONFIG, **more}, adapter="a")
    add_to_both(made, "b", {**CONFIG, **more, "use_rslora": True, "use_dora": False})
    return made


def scalings(model: Any) -> list[dict[str, float]]:
    return [dict(layer.scaling) for layer in model.base_model.layers()]


def test_every_public_name_of_pefts_is_here() -> None:
    theirs = {
        name
        for name, value in vars(peft.helpers).items()
        if getattr(value, "__module__", "") == "peft.helpers" and not name.startswith("_")
    }
    assert theirs == set(helpers.__all__)
    for name in helpers.__all__:
        own, other = (inspect.signature(getattr(m, name)) for m in (helpers, peft.helpers))
        assert list(own.parameters)[: len(other.parameters)] == list(other.parameters), name


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": False}], ids=str)
@pytest.mark.parametrize("multiplier", [0.5, 0, -2, 1.0])
def test_rescaled_outputs_are_pefts_and_come_back(config: Any, multiplier: float) -> None:
    targets = [k for k in KINDS if k not in ("conv2", "emb")] if config.get("use_dora") else KINDS
    made = pair(**config, target_modules=targets)
    before = made.outputs()[0]
    with (
        helpers.rescale_adapter_scale(made.ours, multiplier),
        peft.helpers.rescale_adapter_scale(made.theirs, multiplier),
    ):
        inside = made.assert_equal()
    assert torch.equal(inside, before) == (multiplier == 1)
    assert torch.equal(made.outputs()[0], before)


def test_no_scaling_is_lost_when_the_block_fails() -> None:
    model = pair().ours
    before = scalings(model)
    with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 0.5):
        assert scalings(model) == [{n: s / 2 for n, s in layer.items()} for layer in before]
        raise KeyError
    assert scalings(model) == before


def test_blocks_nest() -> None:
    model = pair().ours
    before = scalings(model)
    with helpers.rescale_adapter_scale(model, 0.5):
        with helpers.rescale_adapter_scale(model, 4):
            assert scalings(model) == [{n: s * 2 for n, s in layer.items()} for layer in before]
        assert scalings(model) == [{n: s / 2 for n, s in layer.items()} for layer in before]
    assert scalings(model) == before


def test_one_adapter_can_be_rescaled_alone() -> None:
    model = pair().ours
    before = scalings(model)
    with helpers.rescale_adapter_scale(model, 3, adapter_names="b"):
        assert scalings(model) == [{"a": x["a"], "b": 3 * x["b"]} for x in before]
    assert scalings(model) == before


def test_an_adapter_that_is_added_in_the_block_keeps_its_scaling() -> None:
    """PEFT's block forgets it, and the model fails afterwards."""
    model = pair().ours
    before = scalings(model)
    with helpers.rescale_adapter_scale(model, 0.5):
        model.add_adapter("c", LoraConfig(target_modules=["lin0"], r=2, lora_alpha=10))
        model.delete_adapter("b")
    after = scalings(model)
    assert [x["a"] for x in after] == [x["a"] for x in before]
    assert [x["c"] for x in after if "c" in x] == [5.0]


def test_a_scaling_that_the_block_sets_stays() -> None:
    model = pair().ours
    layer, before = model.base_model.layers()[0], scalings(model)
    with helpers.rescale_adapter_scale(model, 0.5):
        layer.scaling["a"] = 7.0
    assert scalings(model) == [{**before[0], "a": 7.0}, *before[1:]]


def test_an_adapter_that_is_merged_in_the_block_is_merged_as_it_was_then() -> None:
    model = pair(target_modules=["lin0", "lin1"]).ours
    model.set_adapter("a")
    batch = inputs(model)
    plain = output(model, batch)
    with helpers.rescale_adapter_scale(model, 0.5):
        expected = output(model, batch)
        model.merge_adapter(["a"])
    torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(output(model, batch), plain)


def test_rows_of_a_mixed_batch_are_rescaled_too() -> None:
    model = pair(target_modules=["lin0"]).ours
    batch, names = inputs(model), ["a", "b", "__base__"]
    with model.mixed_batch(names):
        before = output(model, batch)
        with helpers.rescale_adapter_scale(model, 0.0):
            inside = output(model, batch)
        after = output(model, batch)
    with model.disable_adapter():
        torch.testing.assert_close(inside, output(model, batch))
    assert torch.equal(before, after) and not torch.allclose(before, inside, atol=1e-3)


def test_a_model_that_was_adapted_in_place_is_rescaled() -> None:
    model = build(Net)
    inject_adapter_in_model(LoraConfig(target_modules=["lin0"], init_lora_weights=False), model)
    before = output(model, inputs(model))
    with helpers.rescale_adapter_scale(model, 0):
        assert not torch.equal(output(model, inputs(model)), before)
    assert torch.equal(output(model, inputs(model)), before)


@pytest.mark.parametrize(
    ("change", "multiplier", "more", "error", "text"),
    [
        (lambda m: None, "2", {}, ConfigError, "`multiplier` .='2'. must be"),
        (lambda m: None, True, {}, ConfigError, "`multiplier` .=True. must be"),
        (lambda m: None, float("nan"), {}, ConfigError, "must be a finite number"),
        (lambda m: m.merge_adapter(["b"]), 2, {}, StateError, "`b` cannot change while it is"),
        (lambda m: None, 2, {"adapter_names": ["c"]}, AdapterNameError, "called `c`"),
    ],
)
def test_what_cannot_be_rescaled_is_refused_and_nothing_is(
    change: Callable[[Any], None],
    multiplier: Any,
    more: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    model = pair(target_modules=["lin0", "lin1"]).ours
    change(model)
    before = scalings(model)
    with pytest.raises(error, match=text), helpers.rescale_adapter_scale(model, multiplier, **more):
        raise AssertionError
    assert scalings(model) == before


def test_a_model_without_lora_is_refused() -> None:
    for model in (
        build(Net),
        get_peft_model(build(Net), IA3Config(target_modules=["lin0"], feedforward_modules=[])),
    ):
        with pytest.raises(UnsupportedError, match="has no LoRA adapter whose scaling"):
            helpers.rescale_adapter_scale(model, 2).__enter__()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.set_scale("a", -0.3),
        lambda layer: layer.set_scale("b", 0.5),
        lambda layer: layer.scale_layer(0.2),
        lambda layer: (layer.scale_layer(0.8), layer.unscale_layer(4)),
        lambda layer: (layer.scale_layer(2.5), layer.unscale_layer()),
    ],
)
def test_scaling_layers_by_hand_is_pefts(change: Callable[[Any], Any]) -> None:
    made = pair(target_modules=[k for k in KINDS if k != "emb"])
    made.ours.set_adapter(["a", "b"])
    made.theirs.base_model.set_adapter(["a", "b"])
    for model in (made.ours, made.theirs):
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                change(layer)
    made.assert_equal()


def test_scaling_an_embedding_by_hand_scales_it() -> None:
    """PEFT passes embeddings over in `scale_layer` and `unscale_layer`."""
    model = pair().ours
    layer = model.get_base_model().emb
    own = layer.scaling["a"]
    layer.scale_layer(0.5)
    assert layer.scaling["a"] == own / 2
    layer.unscale_layer(0.5)
    assert layer.scaling["a"] == own


def test_a_folder_with_an_adapter_is_known_from_one_without(tmp_path: Path) -> None:
    get_peft_model(build(Net), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text("{nothing")
    found = [helpers.check_if_peft_model(str(tmp_path / name)) for name in "abcd"]
    assert found == [peft.helpers.check_if_peft_model(str(tmp_path / name)) for name in "abcd"]
    assert found == [True, False, False, False]


@pytest.mark.parametrize("active", [True, False])
def test_inputs_are_cast_to_no_adapters_dtype_inside_and_outside(active: bool) -> None:
    seen: list[torch.dtype] = []
    model = get_peft_model(build(Net).bfloat16(), LoraConfig(target_modules=["lin0"]))
    layer = model.get_base_model().lin0
    assert layer.lora_A["default"].weight.dtype == torch.float32
    layer.base_layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    batch = inputs(model)
    outside = output(model, batch)
    with helpers.disable_input_dtype_casting(model, active):
        assert torch.equal(output(model, batch), outside)
    assert seen == [torch.bfloat16] * 2


def test_norms_of_dora_are_kept_with_and_without_the_helper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from multigraft.variants import dora

    made: list[int] = []
    compute = dora._adapted_norm
    monkeypatch.setattr(dora, "_adapted_norm", lambda *a: (made.append(1), compute(*a))[1])
    model = get_peft_model(build(Net), LoraConfig(target_modules=["lin0"], use_dora=True)).eval()
    batch = inputs(model)
    first = output(model, batch)
    count = len(made)
    with helpers.DoraCaching():
        assert torch.equal(output(model, batch), first)
    caching = helpers.DoraCaching()
    caching(enabled=False)
    assert torch.equal(output(model, batch), first)
    assert len(made) == count
    with torch.no_grad():
        model.get_base_model().lin0.lora_B["default"].weight.add_(1.0)
    with helpers.DoraCaching():
        assert not torch.equal(output(model, batch), first)


def test_signatures_become_the_bases_for_this_model_alone() -> None:
    model, other = (get_peft_model(build(llama), LoraConfig(r=2)) for _ in range(2))
    base = model.get_base_model()
    batch = inputs(model)
    before = output(model, batch)
    helpers.update_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert inspect.signature(model.generate) == inspect.signature(base.generate)
    assert model.forward.__doc__ == type(base).forward.__doc__
    assert torch.equal(output(model, batch), before)
    assert torch.equal(model(**batch, adapter_names=["default"] * 3)[0], before)
    assert inspect.signature(other.forward) != inspect.signature(base.forward)
    helpers.update_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_one_signature_can_be_updated_alone(method: str) -> None:
    model = get_peft_model(build(llama), LoraConfig(r=2))
    helpers.update_signature(model, method)
    base = model.get_base_model()
    same = {
        name: inspect.signature(getattr(model, name)) == inspect.signature(getattr(base, name))
        for name in ("forward", "generate")
    }
    assert same == {name: name == method for name in same}


def test_a_base_that_cannot_generate_is_left_alone() -> None:
    model = PeftModel(build(Net), LoraConfig(target_modules=["lin0"]))
    helpers.update_generate_signature(model)
    assert "generate" not in vars(model)
    with pytest.raises(ConfigError, match="must be 'forward', 'generate' or 'all'"):
        helpers.update_signature(model, "backward")


class Task:
    """What a `Trainer` does: the model's loss, or one of its own."""

    own: bool = False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits.square().mean() if self.own else outputs.loss
        return (loss, outputs) if return_outputs else loss


class Mixed(helpers.MontecloraTrainerMixin, Task):
    """A trainer with the helper."""


@pytest.mark.parametrize("own", [False, True])
def test_what_adapters_add_to_the_loss_is_added_once_whoever_computes_it(own: bool) -> None:
    options = {"num_samples": 4, "kl_loss_weight": 0.3}
    config = LoraConfig(r=2, target_modules=["q_proj"], monteclora_config=options)
    model = get_peft_model(build(llama), config).train()
    batch = inputs(model)
    batch["labels"] = batch["input_ids"]
    trainer = Mixed()
    trainer.own = own
    torch.manual_seed(1)
    loss = trainer.compute_loss(model, batch)
    torch.manual_seed(1)
    again, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert torch.equal(loss, again)
    torch.manual_seed(1)
    whole = model(**batch).loss
    (penalty,) = helpers.penalties(model.roster)
    assert penalty > 0
    task = outputs.logits.square().mean() if own else whole - penalty
    torch.testing.assert_close(loss, task + penalty)
