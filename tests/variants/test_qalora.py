"""QA-LoRA against PEFT's layer for it, which exists for GPTQ weights alone, and what is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn

import multigraft
from multigraft import ConfigError, LoraConfig, TargetError, UnsupportedError
from tests.laws import fingerprint
from tests.methods.against_peft import filled, near
from tests.oracle import quiet

GROUP = 4


def config(**options: Any) -> LoraConfig:
    chosen = {"r": 3, "lora_alpha": 5, "use_qalora": True, "qalora_group_size": GROUP}
    return LoraConfig(target_modules=["0"], **(chosen | options))


def model_of(layer: nn.Module | None = None, **options: Any) -> multigraft.PeftModel:
    """A model with a filled adapter, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(layer or nn.Linear(12, 8)).double()
    model = multigraft.get_peft_model(net, config(**options))
    state = multigraft.get_peft_model_state_dict(model)
    multigraft.set_peft_model_state_dict(model, filled(state, 0.3))
    return model.eval()


def theirs_of(model: multigraft.PeftModel, **options: Any) -> nn.Module:
    """PEFT's layer with the same weights and the same adapter."""
    base = nn.Linear(12, 8).double()
    base.load_state_dict(model.get_base_model()[0].base_layer.state_dict())  # type: ignore[index]
    with quiet():
        chosen = {"r": 3, "lora_alpha": 5, "use_qalora": True, "qalora_group_size": GROUP} | options
        layer = GPTQLoraLinear(base, "default", peft.LoraConfig(**chosen), r=3, lora_alpha=5)
    layer.double().load_state_dict(
        {
            k.removeprefix("base_model.model.0.").replace(".weight", ".default.weight"): v
            for k, v in multigraft.get_peft_model_state_dict(model).items()
        },
        strict=False,
    )
    return layer.eval()


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)])
def test_outputs_and_gradients_agree(shape: tuple[int, ...]) -> None:
    ours = model_of()
    theirs = theirs_of(ours)
    x = torch.randn(shape if len(shape) > 1 else (1, *shape), dtype=torch.float64)
    y, z = ours(x), theirs(x)
    near(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    layer = ours.get_base_model()[0]  # type: ignore[index]
    for name in ("lora_A", "lora_B"):
        found, expected = getattr(layer, name)["default"], getattr(theirs, name)["default"]
        assert found.weight.shape == expected.weight.shape
        near(found.weight.grad, expected.weight.grad, name)


def test_dropout_agrees_under_a_seed() -> None:
    ours = model_of(lora_dropout=0.5).train()
    theirs = theirs_of(ours, lora_dropout=0.5).train()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    near(y, theirs(x))
    assert not torch.allclose(y, ours.eval()(x))


def test_it_merges_to_an_update_that_is_constant_within_each_group() -> None:
    model = model_of()
    before = model.get_base_model()[0].base_layer.weight.clone()  # type: ignore[index]
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = model(x)
    base = model.merge_and_unload()
    near(base(x), expected)
    change = (base[0].weight - before).reshape(8, -1, GROUP)  # type: ignore[index]
    assert change.abs().max() > 0.1
    near(change, change[:, :, :1].expand_as(change))


def test_the_number_of_groups_scales_the_mean() -> None:
    model = model_of()
    layer = model.get_base_model()[0]  # type: ignore[index]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(12, dtype=torch.float64)
    pooled: Tensor = torch.stack([x[i : i + GROUP].mean() for i in range(0, 12, GROUP)]) * 3
    near(model(x) - layer.base_layer(x), 5 / 3 * (B @ (A @ pooled)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qalora_group_size": 5}, r"`qalora_group_size` \(=5\) must divide .* try 4, 6"),
        ({"lora_bias": True}, "`use_qalora` cannot be combined with `lora_bias`"),
        ({"init_lora_weights": "orthogonal", "r": 4}, "set `init_lora_weights` to True"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    before = fingerprint(net)
    with pytest.raises(TargetError, match=message):
        multigraft.get_peft_model(net, config(**options))
    assert fingerprint(net) == before


@pytest.mark.parametrize("layer", [nn.Embedding(8, 8), nn.Conv1d(8, 8, 1)], ids=["words", "conv"])
def test_layers_that_are_no_matrices_are_refused(layer: nn.Module) -> None:
    with pytest.raises(TargetError, match="`use_qalora` is for linear layers"):
        multigraft.get_peft_model(nn.Sequential(layer), config())


@pytest.mark.parametrize("size", [0, -4, 2.0, True, None])
def test_a_group_size_that_is_no_count_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="`qalora_group_size`"):
        config(qalora_group_size=size)


@pytest.mark.parametrize("other", [{"use_dora": True}, {"use_bdlora": {"nblocks": 2}}])
def test_no_other_variant_goes_with_it(other: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="cannot be combined; choose one of them"):
        config(**other)


def test_a_file_of_peft_that_ignored_the_option_does_not_fit(tmp_path: Any) -> None:
    """On layers that are not GPTQ's, PEFT trains a plain pair, and still says `use_qalora`."""
    with quiet():
        options = peft.LoraConfig(
            r=3, use_qalora=True, qalora_group_size=GROUP, target_modules=["0"]
        )
        peft.get_peft_model(nn.Sequential(nn.Linear(12, 8)), options).save_pretrained(tmp_path)
    with pytest.raises(multigraft.CheckpointError, match=r"\(3, 12\) instead of \(3, 3\)"):
        multigraft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)), tmp_path)


def test_a_combination_is_the_sum_of_both() -> None:
    model = model_of()
    model.add_adapter("b", config())
    state = multigraft.get_peft_model_state_dict(model, adapter_name="b")
    multigraft.set_peft_model_state_dict(model, filled(state, 0.5), "b")
    model.double()
    x = torch.randn(5, 12, dtype=torch.float64)
    model.base_model.set_adapter(["default", "b"])
    expected = model(x)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", "cat")
    model.double().base_model.set_adapter(["sum"])
    near(model(x), expected)
