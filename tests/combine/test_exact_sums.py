"""`cat` is the weighted sum of adapters, `svd` the nearest to it: on every kind of layer.

The layers are alone and linear in their input, so that outputs add up as updates do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from multigraft import LoraConfig, PeftModel, get_peft_model_state_dict
from multigraft.combine.contract import Options
from multigraft.combine.svd import of_factors, of_matrix
from multigraft.state import set_peft_model_state_dict
from tests.oracle import random_state

W1, W2 = 0.7, -0.4


class One(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return self.layer(x)


class Experts(nn.Module):
    """A stack of expert weights, each applied to the same input."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.randn(3, *((6, 5) if is_transposed else (5, 6))))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 6)`` to ``(batch, 5)``."""
        W = self.stack.mT if self.is_transposed else self.stack
        return torch.einsum("eoi,bi->bo", W, x)


class Attention(nn.Module):
    """Self-attention as a layer: `out_proj` reads what `in_proj` gives, so only it is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, 8)`` to the same shape."""
        return self.attention(x, x, x, need_weights=False)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda: One(nn.Linear(12, 8)), (3, 12), {}),
    "conv1d_transposed": (lambda: One(Conv1D(8, 12)), (3, 12), {}),
    "conv1d": (lambda: One(nn.Conv1d(4, 6, 3)), (2, 4, 7), {}),
    "conv2d": (lambda: One(nn.Conv2d(4, 6, (3, 2))), (2, 4, 7, 5), {}),
    "conv3d": (lambda: One(nn.Conv3d(4, 6, (2, 1, 2))), (2, 4, 3, 3, 3), {}),
    "grouped": (lambda: One(nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 5, 5), {}),
    "experts": (
        lambda: One(Experts(False)),
        (3, 6),
        {"target_modules": [], "target_parameters": ["stack"]},
    ),
    "experts transposed": (
        lambda: One(Experts(True)),
        (3, 6),
        {"target_modules": [], "target_parameters": ["stack"]},
    ),
    "out_proj": (Attention, (2, 3, 8), {"target_modules": ["out_proj"]}),
}


def grafted(name: str, *ranks: int) -> tuple[Any, Tensor]:
    """The layer with an adapter of each rank, filled with random values, and an input."""
    make, shape, where = LAYERS[name]
    torch.manual_seed(1)
    model = PeftModel(make().double().eval(), None)
    for index, rank in enumerate(ranks):
        config = LoraConfig(**{"target_modules": ["layer"], **where}, r=rank, lora_alpha=3 + index)
        model.add_adapter("abc"[index], config)
        fill(model, "abc"[index], index)
    return model, torch.randn(shape, dtype=torch.float64)


def fill(model: Any, adapter: str, seed: int) -> None:
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    set_peft_model_state_dict(model, random_state(state, seed), adapter)


def output(model: Any, x: Tensor, *adapters: str) -> Tensor:
    model.set_adapter(list(adapters))
    y: Tensor = model(x).detach()
    return y


def summed(model: Any, x: Tensor) -> Tensor:
    """The base's output plus the weighted changes of both adapters."""
    with model.disable_adapter():
        y: Tensor = model(x).detach()
    return y + W1 * (output(model, x, "a") - y) + W2 * (output(model, x, "b") - y)


@pytest.mark.parametrize("name", LAYERS)
def test_cat_is_the_sum(name: str) -> None:
    model, x = grafted(name, 2, 4)
    model.add_weighted_adapter(["a", "b"], [W1, W2], "sum", "cat")
    assert model.peft_config["sum"].r == 6
    torch.testing.assert_close(output(model, x, "sum"), summed(model, x))


@pytest.mark.parametrize("name", LAYERS)
def test_svd_of_a_sufficient_rank_is_the_sum(name: str) -> None:
    model, x = grafted(name, 2, 4)
    model.add_weighted_adapter(["a", "b"], [W1, W2], "sum", "svd", svd_rank=8)
    torch.testing.assert_close(output(model, x, "sum"), summed(model, x))


@pytest.mark.parametrize("name", LAYERS)
def test_svd_of_a_lower_rank_is_the_best_approximation(name: str) -> None:
    """As far from the sum as the singular values that it leaves out, group by group."""
    model, _ = grafted(name, 2, 4)
    model.add_weighted_adapter(["a", "b"], [W1, W2], "sum", "svd", svd_rank=2)
    (dense,), (cut,) = (products(model, names) for names in ({"a": W1, "b": W2}, {"sum": 1.0}))
    each = torch.linalg.matrix_rank(cut)
    assert int(each.max()) == (1 if name == "grouped" else 2)
    left_out = torch.linalg.svdvals(dense)[:, int(each.max()) :]
    torch.testing.assert_close((dense - cut).square().sum(), left_out.square().sum())
    assert left_out.max() > 0.01


@pytest.mark.parametrize("rule", ["cat", "svd"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_was_added_can_be_subtracted(name: str, rule: str) -> None:
    """(a + b) - b is a, on every kind of layer."""
    model, x = grafted(name, 2, 4)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    model.add_weighted_adapter(
        ["sum", "b"],
        [1.0, -1.0],
        "again",
        rule,
        svd_rank=2 if name != "grouped" and rule == "svd" else None,
    )
    torch.testing.assert_close(output(model, x, "again"), output(model, x, "a"))


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_less_itself_is_the_base(name: str) -> None:
    model, x = grafted(name, 2)
    model.add_weighted_adapter(["a", "a"], [1.0, -1.0], "none", "cat")
    with model.disable_adapter():
        expected = model(x).detach()
    torch.testing.assert_close(output(model, x, "none"), expected)


def products(model: Any, weights: dict[str, float]) -> list[Tensor]:
    """The dense weighted sum of adapters' updates at each site, ``(n, out, in)``."""
    sums: dict[str, Tensor] = {}
    for adapter, weight in weights.items():
        for layer, graft in model.roster.grafts(adapter):
            method = graft.method
            a, b = method.geometry.pairs(
                graft.site.layer, graft.params[method.A], graft.params[method.B]
            )
            own = weight * method.scaling * (b @ a)
            sums[layer.path] = sums[layer.path] + own if layer.path in sums else own
    return [value.detach() for value in sums.values()]


@pytest.mark.parametrize(("ranks", "rank"), [(5, 3), (5, 5), (30, 6), (30, 40)])
def test_decomposing_the_factors_is_decomposing_the_product(ranks: int, rank: int) -> None:
    """Also where the ranks together are larger than the layer."""
    source = torch.Generator().manual_seed(0)
    a = torch.randn(2, ranks, 14, generator=source, dtype=torch.float64)
    b = torch.randn(2, 20, ranks, generator=source, dtype=torch.float64)
    thin_a, thin_b, _ = of_factors(a, b, rank, Options())
    full_a, full_b, _ = of_matrix(b @ a, rank, Options())
    torch.testing.assert_close(thin_b @ thin_a, full_b @ full_a)
    norms = torch.linalg.norm(thin_b, dim=1), torch.linalg.norm(full_b, dim=1)
    count = min(norms[0].shape[1], norms[1].shape[1])
    torch.testing.assert_close(norms[0][:, :count], norms[1][:, :count])
    eye = torch.eye(thin_a.shape[1], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(thin_a @ thin_a.mT, eye)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [t.numel() for t in made if isinstance(t, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return out


@pytest.mark.parametrize(("rule", "is_dense"), [("svd", False), ("cat", False), ("ties_svd", True)])
def test_only_dense_rules_make_the_dense_product(rule: str, is_dense: bool) -> None:
    model = PeftModel(One(nn.Linear(90, 110)), None)
    for name in "ab":
        model.add_adapter(name, LoraConfig(target_modules=["layer"], r=3))
    density = {"density": 0.5} if is_dense else {}
    with Largest() as largest:
        model.add_weighted_adapter(["a", "b"], [W1, W2], "sum", rule, **density)
    assert (largest.size >= 90 * 110) == is_dense
    assert largest.size >= 6 * 110


def test_a_grouped_convolution_is_combined_densely_by_no_rule() -> None:
    model, _ = grafted("grouped", 2, 2)
    with pytest.raises(ValueError, match=r"`groups` \(=2\) > 1"):
        model.add_weighted_adapter(["a", "b"], [W1, W2], "sum", "ties_svd", density=0.5)
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("rule", ["ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "grouped"])
def test_dense_rules_that_leave_nothing_out(rule: str, name: str) -> None:
    """With one adapter and density 1 each of them is that adapter, at any scale."""
    model, x = grafted(name, 4)
    model.add_weighted_adapter(["a"], [W1], "sum", rule, density=1.0)
    with model.disable_adapter():
        y = model(x)
    torch.testing.assert_close(output(model, x, "sum"), y + W1 * (output(model, x, "a") - y))


def test_a_whole_attention_counts_its_output_as_its_files_do() -> None:
    """PEFT's files mean its `out_proj` twice; a combination of weight 1 is the adapter itself."""
    torch.manual_seed(1)
    model = PeftModel(Attention().double().eval(), None)
    model.add_adapter("a", LoraConfig(target_modules=["attention"], r=2))
    fill(model, "a", 0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for rule in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["a"], [1.0], rule, rule)
        torch.testing.assert_close(output(model, x, rule), output(model, x, "a"))
