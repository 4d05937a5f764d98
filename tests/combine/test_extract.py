"""A LoRA out of a fine-tuned model: nearest layer by layer, with a report of what it lacks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multigraft import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    StateError,
    UnsupportedError,
    extract_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from tests.combine.test_exact_sums import LAYERS
from tests.laws import fingerprint
from tests.oracle import Net, build, inputs, llama, output, quiet

EVERY = ["emb", "lin0", "turned", "conv1", "conv3", "lin1", "head"]


def tuned(maker: Any, *names: str, rank: int | None = None, seed: int = 5) -> nn.Module:
    """The base with every tensor whose name contains one of these changed.

    Args:
        rank: of the change of matrices; full by default.
    """
    model = build(maker)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(part in name for part in names):
                change = torch.randn(tensor.shape, generator=source)
                if rank is not None and tensor.dim() == 2:
                    a = torch.randn(tensor.shape[0], rank, generator=source)
                    change = a @ torch.randn(rank, tensor.shape[1], generator=source)
                tensor += 0.2 * change
    return model


def test_the_whole_difference_is_the_tuned_model(tmp_path: Path) -> None:
    """On every kind of layer, biases included, loaded by either library."""
    goal = tuned(Net, *(f"{name}.weight" for name in EVERY))
    found = extract_lora(build(Net), goal, 1.0, LoraConfig(target_modules=EVERY))
    assert found.left_out == []
    assert found.error < 1e-5
    found.save_pretrained(tmp_path)
    batch = inputs(goal)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(build(Net), tmp_path).eval()
    for model in (PeftModel.from_pretrained(build(Net), tmp_path).eval(), theirs):
        torch.testing.assert_close(output(model, batch), output(goal, batch), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "grouped"])
def test_every_kind_of_layer_is_extracted(name: str) -> None:
    """In float64, which stays; an attention's other tensors are named."""
    make, shape, where = LAYERS[name]
    torch.manual_seed(1)
    base = make().double().eval()
    goal = copy.deepcopy(base)
    config = LoraConfig(**{"target_modules": ["layer"], **where})
    targeted = PeftModel(copy.deepcopy(base), config).base_model.layers()[0].path
    with torch.no_grad():
        for path, parameter in goal.named_parameters():
            if name != "out_proj" or path.endswith("out_proj.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    found = extract_lora(base, goal, 1.0, config)
    assert found.left_out == [] and found.residuals[0].path.startswith(targeted)
    x = torch.randn(shape, dtype=torch.float64)
    expected, before = goal(x), base(x)
    model = PeftModel(base, found.config)
    set_peft_model_state_dict(model, found.state_dict)
    torch.testing.assert_close(model.eval()(x), expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_biases_that_a_layer_cannot_have_are_named() -> None:
    base, goal = (nn.MultiheadAttention(8, 2) for _ in range(2))
    found = extract_lora(
        nn.ModuleList([base]), nn.ModuleList([goal]), 1.0, LoraConfig(target_modules=["0"])
    )
    assert {r.path for r in found.residuals} == {"0.in_proj_weight", "0.out_proj"}
    assert found.left_out == []
    with torch.no_grad():
        goal.in_proj_bias.fill_(1.0)
        goal.out_proj.bias.fill_(1.0)
    found = extract_lora(
        nn.ModuleList([base]), nn.ModuleList([goal]), 1.0, LoraConfig(target_modules=["0"])
    )
    assert found.left_out == ["0.in_proj_bias", "0.out_proj.bias"]


def test_biases_are_taken_over_exactly(tmp_path: Path) -> None:
    goal = tuned(Net, "lin0", "head")
    found = extract_lora(build(Net), goal, 1.0)
    assert found.config.lora_bias
    assert found.left_out == []
    found.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(Net), tmp_path).merge_and_unload()
    torch.testing.assert_close(model.lin0.bias, goal.lin0.bias, rtol=0, atol=1e-7)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(build(Net), tmp_path).eval()
    batch = inputs(goal)
    torch.testing.assert_close(output(theirs, batch), output(goal, batch), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rank", [3, 0.6])
def test_each_layer_has_the_best_pair_of_its_rank(rank: float) -> None:
    goal, base = tuned(Net, "lin0.weight", "lin1.weight"), build(Net)
    found = extract_lora(base, goal, rank)
    squares, lost = 0.0, 0.0
    for report in found.residuals:
        change = goal.get_submodule(report.path).weight - base.get_submodule(report.path).weight
        key = f"base_model.model.{report.path}"
        pair = [found.state_dict[f"{key}.lora_{f}.weight"] for f in "BA"]
        values = torch.linalg.svdvals(change.detach())
        error = float((change - pair[0] @ pair[1]).norm() / change.norm())
        assert report.error == pytest.approx(error, rel=1e-3)
        best = values[report.rank :].square().sum() / values.square().sum()
        assert error == pytest.approx(float(best.sqrt()), rel=1e-3)
        if rank == 0.6:
            before = values[report.rank - 1 :].square().sum() / values.square().sum()
            assert float(best) <= 0.4 < float(before)
        else:
            assert report.rank == 3
        squares += float(change.norm()) ** 2
        lost += (error * float(change.norm())) ** 2
    assert {r.path for r in found.residuals} == {"lin0", "lin1"}
    assert found.error == pytest.approx((lost / squares) ** 0.5, rel=1e-3)


def test_a_merged_lora_is_found_again() -> None:
    model = get_peft_model(build(llama), LoraConfig(target_modules="all-linear", r=3))
    with torch.no_grad():
        for parameter in model.roster.parameters("default"):
            parameter.normal_(std=0.2)
    goal = model.merge_and_unload()
    found = extract_lora(build(llama), goal, 0.999999)
    assert {r.rank for r in found.residuals} == {3}
    assert found.config.rank_pattern == {} and found.config.r == 3
    assert found.left_out == []


def test_layers_that_did_not_change_are_left_out_of_the_targets() -> None:
    goal = tuned(llama, "layers.1.self_attn.q_proj")
    found = extract_lora(build(llama), goal, 2)
    assert [r.path for r in found.residuals] == ["model.layers.1.self_attn.q_proj"]
    assert len(found.state_dict) == 2
    model = PeftModel(build(llama), found.config)
    assert [layer.path for layer in model.base_model.layers()] == [found.residuals[0].path]


def test_what_the_lora_cannot_hold_is_named() -> None:
    goal = tuned(Net, "norm.weight", "conv1", "lin0")
    found = extract_lora(build(Net), goal, 4)
    assert found.left_out == ["norm.weight", "conv1.weight", "conv1.bias"]


def test_saved_modules_are_taken_over_whole(tmp_path: Path) -> None:
    goal = tuned(Net, "norm", "lin0", "head")
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["norm", "head"])
    found = extract_lora(build(Net), goal, 1.0, config)
    assert found.left_out == []
    found.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(Net), tmp_path).eval()
    batch = inputs(goal)
    torch.testing.assert_close(output(model, batch), output(goal, batch), atol=1e-4, rtol=1e-3)


def test_trained_biases_are_copies() -> None:
    goal = tuned(Net, "bias", "lin0.weight")
    config = LoraConfig(target_modules=["lin0"], bias="all")
    found = extract_lora(build(Net), goal, 1.0, config)
    assert found.left_out == []
    copies = {k: v for k, v in found.state_dict.items() if k.endswith("bias")}
    own = {n: p for n, p in goal.named_parameters() if n.endswith("bias")}
    assert len(copies) == len(own)
    for name, value in own.items():
        (copied,) = (v for k, v in copies.items() if k.replace("base_layer.", "").endswith(name))
        assert torch.equal(copied, value)


class Reading(dict):
    """Tensors by name, of which at most one has been given out and not dropped."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state, self.asked = state, []

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.append(name)
        return self.state.get(name, default)


def test_tensors_are_read_one_by_one_and_only_those_that_are_needed() -> None:
    goal = tuned(Net, "lin0")
    reading = Reading(goal.state_dict())
    found = extract_lora(build(Net), reading, 2)
    assert found.residuals == extract_lora(build(Net), goal, 2).residuals
    assert set(reading.asked) <= goal.state_dict().keys()


@pytest.mark.parametrize("split", [False, True])
def test_a_checkpoint_on_disk_is_read_tensor_by_tensor(split: bool, tmp_path: Path) -> None:
    goal = tuned(llama, "q_proj", "mlp")
    state = {k: v.clone() for k, v in goal.state_dict().items()}
    names = sorted(state)
    halves = [names[::2], names[1::2]] if split else [names]
    for index, half in enumerate(halves):
        save_file({n: state[n] for n in half}, tmp_path / f"model-{index}.safetensors")
    found = extract_lora(build(llama), tmp_path, 3)
    expected = extract_lora(build(llama), goal, 3)
    assert found.residuals == expected.residuals
    assert all(torch.equal(v, expected.state_dict[k]) for k, v in found.state_dict.items())


def test_both_models_stay_as_they_are() -> None:
    base, goal = build(Net), tuned(Net, "lin0")
    before = fingerprint(base), fingerprint(goal)
    extract_lora(base, goal, 2)
    assert (fingerprint(base), fingerprint(goal)) == before


def test_half_precision_models_are_compared_in_float32() -> None:
    base, goal = build(Net).bfloat16(), tuned(Net, "lin0").bfloat16()
    found = extract_lora(base, goal, 1.0)
    change = goal.lin0.weight.float() - base.lin0.weight.float()
    pair = [found.state_dict[f"base_model.model.lin0.lora_{f}.weight"] for f in "BA"]
    assert {t.dtype for t in pair} == {torch.float32}
    torch.testing.assert_close(pair[0] @ pair[1], change.detach(), atol=1e-5, rtol=1e-4)


def test_adapters_of_the_base_are_not_in_the_way() -> None:
    base = get_peft_model(build(Net), LoraConfig(target_modules=["lin0"]))
    goal = tuned(Net, "lin0", "norm")
    found = extract_lora(base, goal, 2)
    assert found.residuals == extract_lora(build(Net), goal, 2).residuals
    assert found.left_out == ["norm.weight", "norm.bias"]


def test_shared_weights_that_only_one_module_follows_are_named() -> None:
    base, goal = (build(lambda: llama(tie_word_embeddings=True)) for _ in range(2))
    with torch.no_grad():
        goal.model.embed_tokens.weight.add_(0.1)
        goal.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    assert extract_lora(base, goal, 2).left_out == ["model.embed_tokens.weight", "lm_head.weight"]


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda m: m, StateError, "differs from the base at none of the"),
        (lambda m: without(m.state_dict(), "lin0.weight"), CheckpointError, "no lin0.weight"),
        (
            lambda m: m.state_dict() | {"lin0.weight": torch.zeros(2, 2)},
            CheckpointError,
            r"lin0.weight is \(2, 2\) in `tuned` and \(24, 16\) in the base",
        ),
        (
            lambda m: m.state_dict() | {"lin0.weight": torch.full((24, 16), torch.nan)},
            MergeError,
            "lin0.weight of `tuned` holds NaN",
        ),
        (lambda m: "nowhere/at/all", CheckpointError, r"holds no \*.safetensors"),
        (
            lambda m: get_peft_model(copy.deepcopy(m), LoraConfig(target_modules=["lin0"])),
            UnsupportedError,
            "`tuned` has adapters",
        ),
    ],
)
def test_what_cannot_be_is_refused(change: Any, error: type[Exception], text: str) -> None:
    base = build(Net)
    before = fingerprint(base)
    with pytest.raises(error, match=text):
        extract_lora(base, change(build(Net)), 2)
    with pytest.raises(ConfigError, match="`rank`"):
        extract_lora(base, tuned(Net, "lin0"), 0)
    assert fingerprint(base) == before


def test_grouped_convolutions_and_tokens_are_refused_with_the_remedy() -> None:
    goal = tuned(Net, "conv2", "lin0")
    config = LoraConfig(target_modules=["conv2", "lin0"], r=8)
    with pytest.raises(UnsupportedError, match="conv2 is a convolution with `groups` > 1"):
        extract_lora(build(Net), goal, 2, config)
    config = LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [1]})
    with pytest.raises(UnsupportedError, match="save it whole with `modules_to_save`"):
        extract_lora(build(Net), goal, 2, config)
