"""Megatron's column- and row-parallel layers, with a stand-in for Megatron-Core.

Its regions are Megatron's own in what they compute, over threads in place of processes: a rank is a
thread, and a collective is a meeting of all of them.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multigraft
from multigraft import (
    ConfigError,
    LoraConfig,
    MissingExtraError,
    PeftModel,
    RoutingError,
    TargetError,
    get_peft_model,
)
from multigraft.bases import GEOMETRIES
from tests.laws import fingerprint
from tests.oracle import quiet, random_state

X = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3))  # (sequence, batch, in)


class Ranks:
    """Threads that meet; one rank alone meets nobody."""

    def __init__(self, size: int = 1) -> None:
        self.size, self.own = size, threading.local()
        self.barrier, self.held = threading.Barrier(size), [torch.empty(0)] * size

    @property
    def rank(self) -> int:
        return getattr(self.own, "rank", 0)

    def all(self, x: Tensor) -> list[Tensor]:
        """What every rank has brought."""
        if self.size == 1:
            return [x]
        self.held[self.rank] = x
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found


RANKS = Ranks()


def _region(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Any:
    class Region(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return forward(x.detach()).clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return backward(grads[0]).clone()

    return Region.apply


def total(x: Tensor) -> Tensor:
    return torch.stack(RANKS.all(x)).sum(0)


def own_part(x: Tensor) -> Tensor:
    return x.chunk(RANKS.size, -1)[RANKS.rank]


def whole(x: Tensor) -> Tensor:
    return torch.cat(RANKS.all(x), -1)


REGIONS = {
    "copy_to_tensor_model_parallel_region": _region(lambda x: x, total),
    "reduce_from_tensor_model_parallel_region": _region(total, lambda g: g),
    "scatter_to_tensor_model_parallel_region": _region(own_part, whole),
    "gather_from_tensor_model_parallel_region": _region(whole, own_part),
}


@dataclass
class TransformerConfig:
    tensor_model_parallel_size: int = 1
    params_dtype: torch.dtype = torch.float32


class ColumnParallelLinear(nn.Module):
    def __init__(
        self, input_size: int, output_size: int, *, bias: bool = True, gather_output: bool = False,
        init_method: Any = None, config: Any = None, skip_bias_add: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = self.input_size = input_size
        self.out_features = self.output_size = output_size
        self.gather_output = gather_output
        self.weight = nn.Parameter(torch.randn(output_size // RANKS.size, input_size) * 0.3)
        self.bias = nn.Parameter(torch.randn(output_size // RANKS.size)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = F.linear(REGIONS["copy_to_tensor_model_parallel_region"](x), self.weight, self.bias)
        if self.gather_output:
            y = REGIONS["gather_from_tensor_model_parallel_region"](y)
        return y, None


class RowParallelLinear(nn.Module):
    def __init__(
        self, input_size: int, output_size: int, *, bias: bool = True, init_method: Any = None,
        input_is_parallel: bool = True, config: Any = None, skip_bias_add: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = self.input_size = input_size
        self.out_features = self.output_size = output_size
        self.input_is_parallel = input_is_parallel
        self.weight = nn.Parameter(torch.randn(output_size, input_size // RANKS.size) * 0.3)
        self.bias = nn.Parameter(torch.randn(output_size)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.input_is_parallel:
            x = REGIONS["scatter_to_tensor_model_parallel_region"](x)
        y = REGIONS["reduce_from_tensor_model_parallel_region"](F.linear(x, self.weight))
        return y, self.bias


class Feed(nn.Module):
    """A column-parallel layer and a row-parallel one, as Megatron pairs them."""

    def __init__(self, gathered: bool = False) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(8, 12, gather_output=gathered)
        self.down = RowParallelLinear(12, 8, input_is_parallel=not gathered)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.up(x)
        y, bias = self.down(torch.tanh(h))
        return y + bias


@pytest.fixture(autouse=True)
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`megatron.core`, and a modified one."""
    for core in ("megatron.core", "megatron.mine"):
        parallel = types.ModuleType(f"{core}.tensor_parallel")
        vars(parallel).update(REGIONS)
        for cls in (ColumnParallelLinear, RowParallelLinear):
            setattr(parallel, cls.__name__, cls)
        module: Any = types.ModuleType(core)
        module.tensor_parallel = parallel
        module.transformer = types.SimpleNamespace(
            transformer_config=types.SimpleNamespace(TransformerConfig=TransformerConfig)
        )
        monkeypatch.setitem(sys.modules, core, module)
        monkeypatch.setitem(sys.modules, f"{core}.tensor_parallel", parallel)
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    for cls in (ColumnParallelLinear, RowParallelLinear):
        monkeypatch.setattr(cls, "__module__", "megatron.core.tensor_parallel.layers")
    yield
    GEOMETRIES._found.clear()


def feed(gathered: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Feed(gathered).eval()


def options(**more: Any) -> dict[str, Any]:
    config = {"tensor_model_parallel_size": 1}
    return {"target_modules": ["up", "down"], "r": 2, "megatron_config": config, **more}


def adapted(gathered: bool = False, **more: Any) -> PeftModel:
    model = get_peft_model(feed(gathered), LoraConfig(**options(**more)))
    multigraft.set_peft_model_state_dict(
        model, random_state(multigraft.get_peft_model_state_dict(model))
    )
    return model.eval()


def test_peft_cannot_adapt_them():
    """So outputs and gradients are compared with PEFT's of the same weights in plain layers."""
    with pytest.raises(KeyError, match="fan_in_fan_out"):
        peft.get_peft_model(feed(), peft.LoraConfig(**options()))


@pytest.mark.parametrize("target", ["up", "down"])
def test_outputs_and_gradients_are_pefts_of_plain_layers(target: str):
    class Plain(nn.Module):
        def __init__(self, feed: Any) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.load_state_dict(feed.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)))

    ours = adapted(target_modules=[target])
    with quiet():
        config = peft.LoraConfig(target_modules=[target], r=2)
        theirs = peft.get_peft_model(Plain(feed()), config)
        peft.set_peft_model_state_dict(theirs, multigraft.get_peft_model_state_dict(ours))
    grads = []
    for model in (ours, theirs):
        y = model(X)
        y.square().sum().backward()
        grads.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == 3
    for mine, own in zip(*grads, strict=True):
        torch.testing.assert_close(mine, own)
    with quiet():
        torch.testing.assert_close(ours.merge_and_unload()(X), theirs.merge_and_unload()(X))


@pytest.mark.parametrize("gathered", [False, True])
def test_two_ranks_compute_what_one_computes(gathered: bool, monkeypatch: pytest.MonkeyPatch):
    one = adapted(gathered)
    one(X).square().sum().backward()
    truth = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    state = {n: t.detach() for n, t in one.state_dict().items()}
    monkeypatch.setitem(globals(), "RANKS", Ranks(2))

    def shard(name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a whole model's tensor."""
        is_column = ".up." in name and ("base_layer" in name or "lora_B" in name)
        is_row = ".down." in name and ("base_layer.weight" in name or "lora_A" in name)
        axis = 0 if is_column else 1 if is_row else None
        return tensor if axis is None else tensor.chunk(2, axis)[RANKS.rank]

    def run(rank: int, model: PeftModel) -> tuple[Tensor, dict[str, bool]]:
        RANKS.own.rank = rank
        model.load_state_dict({n: shard(n, t) for n, t in state.items()})
        y = model(X)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        close = {
            n: torch.allclose(g, shard(n, truth[n]), atol=1e-3, rtol=1e-4) for n, g in grads.items()
        }
        return y, close

    models = [adapted(gathered) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2), models))
    for y, close in results:
        torch.testing.assert_close(y, one(X) if RANKS.size == 1 else y)
        assert len(close) == 4 and all(close.values()), close
    torch.testing.assert_close(results[0][0], results[1][0])


def test_the_base_comes_back_and_adapters_stand_side_by_side():
    base = feed()
    before = fingerprint(base)
    model = get_peft_model(base, LoraConfig(**options(init_lora_weights=False)))
    first = model(X)
    model.add_adapter("b", LoraConfig(**options(init_lora_weights=False)))
    assert torch.equal(model(X), first)
    model.base_model.set_adapter(["default", "b"])
    assert not torch.allclose(model(X), first)
    model.unload()
    assert fingerprint(base) == before


def test_a_layer_gives_its_bias_beside_as_before():
    model = adapted(target_modules=["down"])
    base = model.get_base_model()
    y, bias = base.down(torch.zeros(1, 1, 12))
    assert bias is base.down.base_layer.bias and torch.equal(y, torch.zeros(1, 1, 8))


@pytest.mark.parametrize("given", [TransformerConfig(), {"tensor_model_parallel_size": 1}])
def test_its_config_may_be_an_object_and_is_saved_as_far_as_a_file_can(given: Any, tmp_path: Path):
    model = adapted(megatron_config=given)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["megatron_config"] == {"tensor_model_parallel_size": 1}


@pytest.mark.parametrize("given", ["x", 3, ["a"]])
def test_a_config_that_is_none_is_refused(given: Any):
    with pytest.raises(ConfigError, match="a dictionary, a TransformerConfig"):
        LoraConfig(megatron_config=given)


def test_files_go_round(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(feed(), tmp_path).eval()(X), model(X))


def test_megatrons_own_layers_need_no_option():
    assert adapted(megatron_config=None)(X).shape == X.shape


def test_a_core_of_ones_own_is_named(monkeypatch: pytest.MonkeyPatch):
    for cls in (ColumnParallelLinear, RowParallelLinear):
        monkeypatch.setattr(cls, "__module__", "megatron.mine.tensor_parallel.layers")
    GEOMETRIES._found.clear()
    with pytest.raises(TargetError, match="it adapts layers of the kinds"):
        adapted(megatron_config=None)
    try:
        torch.testing.assert_close(adapted(megatron_core="megatron.mine")(X), adapted()(X))
    finally:
        GEOMETRIES.unregister(ColumnParallelLinear, RowParallelLinear)


@pytest.mark.parametrize(
    ("core", "error"), [("os", ConfigError), (None, ConfigError), ("megatron.x", MissingExtraError)]
)
def test_a_core_outside_megatron_is_not_imported(core: Any, error: type[Exception]):
    with pytest.raises(error, match="megatron_core"):
        adapted(megatron_core=core)


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_more_than_a_plain_pair_is_refused(more: dict[str, Any]):
    base = feed()
    before = fingerprint(base)
    with pytest.raises(TargetError, match=r"cannot be had on shards|not for megatron"):
        get_peft_model(base, LoraConfig(**options(**more)))
    assert fingerprint(base) == before


def test_rows_of_a_batch_are_refused():
    with pytest.raises(RoutingError, match="cannot be told apart"):
        adapted()(X, adapter_names=["default"] * 5)
