"""Mixed batches at a layer: adapters together and alone, and what a `mixed_batch` block keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from multigraft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    RoutingError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

NAMES = ["a", "b", "__base__", "a"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., 6) to (rows, ..., 5)."""
        return self.down(torch.tanh(self.up(x)))


def lora(rank: int = 2, **options: object) -> LoraConfig:
    options = {"target_modules": ["up", "down"], "init_lora_weights": False, **options}
    return LoraConfig(r=rank, **options)  # type: ignore[arg-type]


def model_with(**configs: object) -> PeftModel:
    torch.manual_seed(0)
    base, model = Two().double(), None
    for name, config in configs.items():
        if model is None:
            model = get_peft_model(base, config, name)  # type: ignore[arg-type]
        else:
            model.add_adapter(name, config)  # type: ignore[arg-type]
    assert model is not None
    return model.eval()


def batch(rows: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 3, 6, dtype=torch.float64)


def row_by_row(model: PeftModel, x: Tensor, names: list[str]) -> Tensor:
    """What each row gives when its adapter is the only active one."""
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(x[row : row + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[row : row + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("names", [NAMES, ["a", "a", "b", "b"], ["b", "a", "b", "b"]])
def test_adapters_of_different_ranks_and_targets_serve_their_rows(
    names: list[str], grads: bool
) -> None:
    model = model_with(a=lora(1), b=lora(3, lora_alpha=5, target_modules=["up"]))
    with torch.set_grad_enabled(grads):
        expected = row_by_row(model, batch(), names)
        torch.testing.assert_close(model(batch(), adapter_names=names), expected)


def test_pairs_run_together_and_other_methods_beside_them() -> None:
    ia3 = IA3Config(target_modules=["up"], feedforward_modules=[], init_ia3_weights=False)
    model = model_with(a=lora(), b=ia3, c=lora(3, use_dora=True), d=lora(1))
    names = ["a", "b", "c", "d"]
    torch.testing.assert_close(
        model(batch(), adapter_names=names), row_by_row(model, batch(), names)
    )


def test_gradients_are_those_of_each_adapter_alone() -> None:
    model = model_with(a=lora(1), b=lora(3))
    model.base_model.set_requires_grad(["a", "b"])
    names = ["a", "b", "b", "a"]
    model(batch(), adapter_names=names).square().sum().backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name in ("a", "b"):
        model.zero_grad()
        model.set_adapter(name)
        own = batch()[[row for row, who in enumerate(names) if who == name]]
        model(own).square().sum().backward()
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                torch.testing.assert_close(mixed[path], parameter.grad)


def test_dropout_in_training_keeps_rows_apart() -> None:
    model = model_with(a=lora(lora_dropout=0.5), b=lora()).train()
    x = batch()
    torch.manual_seed(2)
    first = model(x, adapter_names=NAMES)
    torch.manual_seed(3)
    second = model(x, adapter_names=NAMES)
    differs = (first != second).flatten(1).any(1).tolist()
    assert differs == [True, False, False, True]


@torch.no_grad()
def test_calls_in_a_block_are_those_with_the_names() -> None:
    model = model_with(a=lora(), b=lora(3))
    expected = [model(batch(), adapter_names=NAMES), model(2 * batch(), adapter_names=NAMES)]
    alone = model(batch())
    with model.mixed_batch(NAMES):
        found = [model(batch()), model(2 * batch())]
        assert len(model.roster.route.companies) == 2
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(model(batch()), alone)


@torch.no_grad()
@pytest.mark.parametrize("how", ["scale", "values", "readd", "train"])
def test_what_changes_inside_a_block_is_seen_there(how: str) -> None:
    model = model_with(a=lora(), b=lora(3))
    other = get_peft_model_state_dict(model_with(b=lora(), a=lora()), adapter_name="a")
    with model.mixed_batch(NAMES):
        before = model(batch())
        if how == "scale":
            model.get_base_model().up.scaling["a"] = 7.0
        elif how == "values":
            set_peft_model_state_dict(model, other, "a")
        elif how == "readd":
            model.delete_adapter("a")
            model.add_adapter("a", lora(1))
        else:
            step(model)
        found = model(batch())
    assert torch.equal(found, model(batch(), adapter_names=NAMES))
    changed = (found != before).flatten(1).any(1).tolist()
    assert changed == [True, False, False, True]


@torch.enable_grad()
def step(model: PeftModel) -> None:
    """One step of gradient descent on the first row's adapter."""
    model.base_model.set_requires_grad("a")
    model(batch())[0].square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("how", ["merge", "delete", "disable"])
def test_a_block_refuses_calls_that_its_adapters_can_no_longer_serve(how: str) -> None:
    model = model_with(a=lora(), b=lora())
    with model.mixed_batch(NAMES):
        if how == "merge":
            model.merge_adapter(["b"])
            message = "Call unmerge_adapter"
        elif how == "delete":
            model.delete_adapter("b")
            message = "no adapter is called `b`"
        else:
            model.base_model.disable_adapter_layers()
            message = "adapters are disabled"
        with pytest.raises(RoutingError, match=message):
            model(batch())


def test_a_block_checks_its_names_first_and_ends_with_an_error_in_it() -> None:
    model = model_with(a=lora(), b=lora())
    with pytest.raises(RoutingError, match="no adapter is called `x`"), model.mixed_batch(["x"]):
        pass
    with pytest.raises(ZeroDivisionError), model.mixed_batch(NAMES):
        1 / 0  # noqa: B018 (raises)
    assert model.roster.route is None


def test_a_batch_of_another_size_is_refused_in_a_block() -> None:
    model = model_with(a=lora(), b=lora())
    with model.mixed_batch(NAMES), pytest.raises(RoutingError, match="first axis"):
        model(batch(3))


def test_nothing_of_a_block_stays_on_the_model() -> None:
    model = model_with(a=lora(), b=lora())
    with torch.no_grad(), model.mixed_batch(NAMES):
        model(batch())
    assert copy.deepcopy(model).roster.route is None
    assert not any("compan" in name for m in model.modules() for name in vars(m))
