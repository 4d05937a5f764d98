"""DoRA's norm: taken from the factors, as often as they change and no more often."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import LoraConfig
from multigraft.variants import dora
from tests.methods.against_peft import filled

Change = Callable[[Any], Any]


def adapted(layer: nn.Module | None = None, **options: Any) -> Any:
    """One layer with a filled DoRA, in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(layer or nn.Linear(9, 6))
    chosen = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "use_dora": True} | options
    model = multigraft.get_peft_model(net, LoraConfig(**chosen))
    state = multigraft.get_peft_model_state_dict(model)
    multigraft.set_peft_model_state_dict(model, filled(state, 0.5))
    return model.train()


def layer_of(model: Any) -> Any:
    return model.get_base_model()[0]


def tensors(model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    (graft,) = layer_of(model).grafts[adapter]
    return dict(graft.params)


def by_hand(model: Any, x: Tensor) -> Tensor:
    """What the only adapter makes of a linear layer, by the dense product."""
    (graft,) = layer_of(model).grafts["default"]
    A, B, m = graft.params.values()
    V = graft.site.weight() + graft.method.scaling * B @ A
    W = m[:, None] * V / V.norm(dim=1, keepdim=True)
    return nn.functional.linear(x, W.to(x.dtype), layer_of(model).base_layer.bias)


def batch(model: Any, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(4, 9, generator=source).to(layer_of(model).base_layer.weight)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An entry for each time that a norm is computed."""
    calls: list[Any] = []
    real = dora._adapted_norm
    monkeypatch.setattr(dora, "_adapted_norm", lambda *args: calls.append(args) or real(*args))
    yield calls


def test_accumulating_gradients_takes_one_norm_a_step(computed: list[Any]) -> None:
    model = adapted()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        computed.clear()
        for seed in range(3):
            x = batch(model, seed)
            torch.testing.assert_close(model(x), by_hand(model, x))
            model(x).square().sum().backward()
        assert len(computed) == 1
        optimiser.step()
        optimiser.zero_grad()


def test_evaluation_takes_one_norm_for_all_forwards(computed: list[Any]) -> None:
    model = adapted().eval()
    computed.clear()
    for seed in range(3):
        with torch.inference_mode(seed == 1):
            model(batch(model, seed))
    model.train()
    model(batch(model)).sum().backward()
    assert len(computed) == 1


def test_the_bases_part_outlives_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], dora._square
    monkeypatch.setattr(dora, "_square", lambda *args: calls.append(args) or real(*args))
    model = adapted()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(batch(model)).square().sum().backward()
        optimiser.step()
    assert len(calls) == 1


OPTIMISERS: dict[str, Change] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.3, foreach=True),
}


class ThroughData(torch.optim.Optimizer):
    """One that torch does not see writing, as optimisers with kernels of their own are."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= 0.3 * p.grad


@pytest.mark.parametrize("made", [*OPTIMISERS.values(), ThroughData], ids=[*OPTIMISERS, "data"])
def test_every_optimisers_step_is_seen(made: Change) -> None:
    model = adapted()
    optimiser = made([p for p in model.parameters() if p.requires_grad])
    x = batch(model)
    for _ in range(2):
        y = model(x)
        torch.testing.assert_close(y, by_hand(model, x))
        y.square().sum().backward()
        optimiser.step()
    assert not torch.allclose(model(x), y)
    torch.testing.assert_close(model(x), by_hand(model, x))


@pytest.mark.parametrize("made", [*OPTIMISERS.values(), ThroughData], ids=[*OPTIMISERS, "data"])
def test_a_step_is_enough_where_values_are_not_compared(
    made: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other devices than the CPU, that is."""
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    test_every_optimisers_step_is_seen(made)


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        tensors(model)["lora_A.weight"].mul_(2)


def write_through_data(model: Any) -> None:
    tensors(model)["lora_B.weight"].data.mul_(2)


def replace_data(model: Any) -> None:
    p = tensors(model)["lora_B.weight"]
    p.data = p.data + 1


def replace_twice(model: Any) -> None:
    """Where the allocator may hand out the first one's memory again."""
    p = tensors(model)["lora_B.weight"]
    p.data = p.data + 1
    p.data = p.data + 1


def load(model: Any) -> None:
    state = multigraft.get_peft_model_state_dict(model)
    multigraft.set_peft_model_state_dict(model, filled(state, 0.9))


def narrow_and_widen(model: Any) -> None:
    model.half().float()


def change_the_base(model: Any) -> None:
    with torch.no_grad():
        layer_of(model).base_layer.weight.mul_(3)


def replace_the_base(model: Any) -> None:
    layer = layer_of(model).base_layer
    layer.weight = nn.Parameter(layer.weight.detach() + 1, requires_grad=False)


def scale(model: Any) -> None:
    layer_of(model).set_scale("default", 3.0)


CHANGES = [
    write_in_place,
    write_through_data,
    replace_data,
    replace_twice,
    load,
    narrow_and_widen,
    change_the_base,
    replace_the_base,
    scale,
    lambda model: model.double(),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("is_training", [True, False])
def test_what_changes_is_seen(change: Change, is_training: bool) -> None:
    model = adapted().train(is_training)
    before = model(batch(model))
    change(model)
    after = model(batch(model))
    assert not torch.equal(after.float(), before.float())
    torch.testing.assert_close(after, by_hand(model, batch(model)))


def test_merging_and_unmerging_another_adapter_leaves_the_norm_of_the_base() -> None:
    model = adapted().eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = batch(model)
    before = model(x)
    model.set_adapter("other")
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(model(x), before)


def test_merged_the_layer_gives_the_same_and_unmerged_as_well() -> None:
    model = adapted().eval()
    x = batch(model)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)


def test_a_deep_copy_and_a_pickled_model_go_their_own_ways() -> None:
    model = adapted()
    x = batch(model)
    model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(x), model(x))
        write_in_place(twin)
        torch.testing.assert_close(twin(x), by_hand(twin, x))
        torch.testing.assert_close(model(x), by_hand(model, x))


def test_other_tensors_for_one_call_get_a_norm_of_their_own() -> None:
    model = adapted()
    x = batch(model)
    before = model(x)
    names = dict(model.named_parameters())
    others = {n: p * 2 for n, p in names.items() if "lora_B" in n}
    found = torch.func.functional_call(model, others, (x,))
    with torch.no_grad():
        tensors(model)["lora_B.weight"].mul_(2)
        expected = by_hand(model, x)
        tensors(model)["lora_B.weight"].div_(2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(x), before)


def test_after_inference_mode_the_model_trains() -> None:
    model = adapted()
    with torch.inference_mode():
        model(batch(model))
    model(batch(model)).square().sum().backward()
    assert all(p.grad is not None for p in tensors(model).values())


def test_autocast_does_not_narrow_the_norm() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        model(batch(model))
    torch.testing.assert_close(model(batch(model)), by_hand(model, batch(model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_is_widened_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dora, "BLOCK", 20)
    model = adapted(nn.Linear(9, 6, dtype=dtype))
    (graft,) = layer_of(model).grafts["default"]
    A, B, _ = graft.params.values()
    assert A.dtype == torch.float32
    V = graft.site.weight().double() + graft.method.scaling * B.double() @ A.double()
    found = dora._norm(graft.method, graft.params)[0]
    torch.testing.assert_close(found, V.norm(dim=1), check_dtype=False, rtol=1e-6, atol=1e-6)


def test_compiled_it_gives_the_same_whatever_the_step() -> None:
    model = adapted()
    x = batch(model)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(x), by_hand(model, x))
        write_in_place(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_of_another_type_than_the_input_get_the_norm_of_their_own(
    dtype: torch.dtype,
) -> None:
    model = adapted(nn.Linear(9, 6)).train()
    layer = layer_of(model)
    for parameter in tensors(model).values():
        parameter.data = parameter.data.to(dtype)
    (graft,) = layer.grafts["default"]
    for _ in range(2):
        A, B, _ = graft.params.values()
        V = graft.site.weight().double() + graft.method.scaling * B.double() @ A.double()
        model(torch.ones(4, 9))
        found = dora.Norm(graft.method, graft.params).kept()
        torch.testing.assert_close(found, V.norm(dim=1), check_dtype=False, rtol=1e-6, atol=1e-6)
        write_in_place(model)
