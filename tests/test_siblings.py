"""Layers that read one input run as one: the same values, for whoever is called how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, PeftModel, get_peft_model
from multigraft.siblings import Siblings


class Attention(nn.Module):
    """Three projections of one input, or of two; what is asked for is used."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4, bias=bias) for bias in (True, False, True))
        self.o = nn.Linear(4, 6)

    def forward(self, x: Tensor, other: Tensor | None = None, uses: str = "qkv") -> Tensor:
        """(rows, ..., 6) to the same."""
        seen = x if other is None else other
        parts = [self.q(x) if "q" in uses else None]
        parts += [getattr(self, name)(seen) for name in "kv" if name in uses]
        return self.o(sum(part.tanh() for part in parts if part is not None))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        """(rows, ..., 6) to the same."""
        return self.attention(x * 1, **more)


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    peft_model = get_peft_model(Net().double(), config, "a")
    peft_model.add_adapter(
        "b", LoraConfig(r=3, target_modules=["q", "k", "v"], lora_alpha=5, init_lora_weights=False)
    )
    return peft_model


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which layers ran as one, call by call."""
    seen: list[str] = []
    real = Siblings.run

    def watch(self: Any, layer: Any, *more: Any) -> Any:
        before = self.x
        y = real(self, layer, *more)
        if self.x is not None and self.x is not before:
            seen.append("".join(each.path[-1] for each in (layer, *self.waiting)))
        return y

    monkeypatch.setattr(Siblings, "run", watch)
    return seen


def batch(rows: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 3, 6, dtype=torch.float64)


class OneByOne:
    """Runs every layer by itself while it is entered."""

    def __enter__(self) -> None:
        self.real = Siblings.run
        Siblings.run = lambda *_: None  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        Siblings.run = self.real  # type: ignore[method-assign]


def alone(model: PeftModel, run: Callable[[PeftModel], Any]) -> Any:
    """What layers that run one by one give."""
    with OneByOne():
        return run(model)


def gradients(model: PeftModel, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y.pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(model: PeftModel, run: Callable[[PeftModel], Tensor]) -> None:
    """Output and gradients are those of layers that run one by one."""
    with OneByOne():
        expected = run(model)
        wanted = gradients(model, expected)
    y = run(model)
    found = gradients(model, y)
    near = 1e-10 if y.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(y, expected, rtol=near, atol=near)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=near, atol=near, msg=name)


def test_projections_of_one_input_run_as_one(model: PeftModel, together: list[str]) -> None:
    check(model, lambda m: m(batch()))
    assert together == ["qkv"]


def test_one_node_serves_all_of_them(model: PeftModel) -> None:
    model(batch())
    calls: list[str] = []
    y = model(batch())
    stack = [y.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            calls.append(node.name())
            stack += [parent for parent, _ in node.next_functions]
    assert sum("AdaptedLinears" in name for name in calls) == 2  # q, k and v; and o


def test_where_some_read_another_input_they_run_apart_from_then_on(
    model: PeftModel, together: list[str]
) -> None:
    other = batch(2).repeat(2, 1, 1) + 1
    check(model, lambda m: m(batch(), other=other))
    assert together == ["qkv"]
    check(model, lambda m: m(batch(), other=other))
    assert together == ["qkv"]


@pytest.mark.parametrize("name", ["encoder_attn", "crossattention", "EncDecAttention", "attn2"])
def test_a_cross_attention_by_name_never_runs_as_one(name: str) -> None:
    assert Siblings(f"layers.0.{name}").is_split
    assert not Siblings(f"layers.0.{name}.self_attn").is_split


def test_a_layer_that_is_not_called_holds_up_nobody(model: PeftModel) -> None:
    for _ in range(3):
        check(model, lambda m: m(batch(), uses="qv"))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.set_adapter(["a", "b"]),
        lambda m: m.delete_adapter("b"),
        lambda m: m.merge_adapter(["b"]),
        lambda m: m.eval(),
        lambda m: m.float(),
        lambda m: m.get_base_model().attention.k.base_layer.weight.requires_grad_(True),
        lambda m: m.get_base_model().attention.k.base_layer.register_forward_hook(
            lambda module, args, y: y * 2
        ),
        lambda m: m.get_base_model().attention.v.register_forward_hook(
            lambda module, args, y: y + 1
        ),
        lambda m: m.get_base_model().attention.k.lora_A["a"].weight.data.mul_(3),
    ],
    ids=[
        "set",
        "both",
        "delete",
        "merge",
        "eval",
        "float",
        "trainable",
        "base-hook",
        "hook",
        "data",
    ],
)
def test_whatever_changes_between_two_calls_is_seen(
    model: PeftModel, change: Callable[[PeftModel], Any]
) -> None:
    for _ in range(2):
        model(batch())
    change(model)
    dtype = next(model.parameters()).dtype
    check(model, lambda m: m(batch().to(dtype)))
    check(model, lambda m: m(batch().to(dtype)))


def test_a_change_between_two_layers_of_one_call_is_seen(model: PeftModel) -> None:
    for _ in range(2):
        model(batch())
    attention = model.get_base_model().attention

    def switch(*_: Any) -> None:
        model.set_adapter("b")

    model.set_adapter("a")
    attention.k.register_forward_pre_hook(switch)
    found = model(batch())
    model.set_adapter("a")
    torch.testing.assert_close(found, alone(model, lambda m: m(batch())))


def test_an_input_that_is_written_to_between_two_layers_is_another_one() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            """(rows, 6) to the same."""
            y = self.q(x)
            x.mul_(2)
            return y + self.k(x)

    config = LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    peft_model = get_peft_model(Writes().double(), config)
    x = torch.randn(2000, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = alone(peft_model, lambda m: m(x.clone()))
        torch.testing.assert_close(peft_model(x.clone()), expected)


def test_rows_of_many_adapters_run_together_as_well(model: PeftModel, together: list[str]) -> None:
    for names in (["a", "a", "b", "b"], ["b", "a", "b", "a"], ["a", "a", "a", "__base__"]):
        for _ in range(2):
            check(model, lambda m, names=names: m(batch(), adapter_names=names))
        with torch.no_grad(), model.mixed_batch(names):
            found = [model(batch()) for _ in range(3)]
            expected = alone(model, lambda m: m(batch()))
        for y in found:
            torch.testing.assert_close(y, expected)
    assert "qkv" in together


def test_dropout_stays_each_layers_own(model: PeftModel, together: list[str]) -> None:
    model.add_adapter("c", LoraConfig(r=2, target_modules=["q", "k", "v"], lora_dropout=0.5))
    model.set_adapter("c")
    model.train()(batch())
    assert together == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_with_dora_run_as_one_unless_they_drop_what_the_base_sees(
    model: PeftModel, together: list[str], dropout: float
) -> None:
    config = LoraConfig(r=2, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    config.use_dora, config.lora_dropout = True, dropout
    model.add_adapter("c", config, autocast_adapter_dtype=False)
    model.set_adapter("c")
    if dropout:
        model.train()(batch())
        assert together == []
        model.eval()
    check(model, lambda m: m(batch()))
    assert together[-1] == "qkv"


def test_what_waits_is_gone_once_all_have_been_served(model: PeftModel) -> None:
    for _ in range(2):
        model(batch())
    family = model.get_base_model().attention.q.siblings
    assert family.x is None and not family.waiting


def test_layers_of_a_copy_run_with_each_other(model: PeftModel, together: list[str]) -> None:
    twin = copy.deepcopy(model)
    attention = twin.get_base_model().attention
    assert all(getattr(attention, n) is attention.q.siblings.members[n] for n in "qkvo")
    check(twin, lambda m: m(batch()))
    assert together == ["qkv"]


def test_layers_that_lost_their_adapters_and_got_new_ones_run_together(
    model: PeftModel, together: list[str]
) -> None:
    model.base_model.delete_adapter("a")
    model.base_model.delete_adapter("b")
    again = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    model.add_adapter("c", again)
    model.set_adapter("c")
    check(model, lambda m: m(batch()))
    assert together == ["qv"]


def test_gradient_checkpointing_recomputes_them_together(model: PeftModel) -> None:
    from torch.utils.checkpoint import checkpoint

    x = batch().requires_grad_()
    for reentrant in (True, False):
        check(model, lambda m, r=reentrant: checkpoint(m, x, use_reentrant=r))


@pytest.mark.parametrize("names", [None, ["a", "a", "b", "b"], ["b", "a", "b", "__base__"]])
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_without_a_break_they_run_as_one(
    model: PeftModel, names: list[str] | None, grad: bool
) -> None:
    more = {} if names is None else {"adapter_names": names}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        expected = alone(model, lambda m: m(batch(), **more))
        torch.testing.assert_close(compiled(batch(), **more), expected)
    if grad:
        wanted = gradients(model, expected)
        found = gradients(model, compiled(batch(), **more))
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, msg=name)
