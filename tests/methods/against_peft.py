"""One differential suite for every method: what PEFT and Multigraft make of the same options.

A test file subclasses `AgreesWithPeft` with its cases; each check then runs once per case. Values
are compared in float64 unless the case says otherwise, so that a wrong formula cannot hide in
rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import multigraft
from multigraft import MultigraftWarning
from tests.laws import fingerprint
from tests.oracle import our_config, peft_config, peft_state, quiet

ROWS = 3


class One(nn.Module):
    """One layer to adapt, and enough behind it that its output matters in every element."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input to a bounded function of its output."""
        return torch.tanh(self.layer(x))

    def batch(self) -> Tensor:
        """Seeded input: floating point with a gradient, or token indices."""
        source = torch.Generator().manual_seed(5)
        if isinstance(self.layer, nn.Embedding):
            return torch.randint(0, self.layer.num_embeddings, self.shape, generator=source)
        x = torch.randn(self.shape, generator=source, dtype=torch.float64)
        return x.requires_grad_()


LAYERS: dict[str, Callable[[], One]] = {
    "linear": lambda: One(nn.Linear(12, 8), (ROWS, 4, 12)),
    "linear wide": lambda: One(nn.Linear(6, 18, bias=False), (ROWS, 6)),
    "conv1d_transposed": lambda: One(Conv1D(8, 12), (ROWS, 4, 12)),
    "embedding": lambda: One(nn.Embedding(20, 8), (ROWS, 5)),
    "conv1d": lambda: One(nn.Conv1d(6, 8, 3, padding=1), (ROWS, 6, 7)),
    "conv2d": lambda: One(nn.Conv2d(4, 8, (3, 2), stride=(1, 2)), (ROWS, 4, 6, 5)),
    "conv2d 1x1": lambda: One(nn.Conv2d(4, 8, 1, bias=False), (ROWS, 4, 3, 3)),
    "conv3d": lambda: One(nn.Conv3d(4, 6, (2, 1, 2), bias=False), (ROWS, 4, 3, 2, 3)),
}


class Two(nn.Module):
    """Two layers of different sizes, for methods whose tensors all sites share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 6)`` to ``(..., 4)``."""
        return self.layer[1](torch.tanh(self.layer[0](x)))

    def batch(self) -> Tensor:
        """Seeded input with a gradient."""
        source = torch.Generator().manual_seed(5)
        return torch.randn((ROWS, 6), generator=source, dtype=torch.float64).requires_grad_()


@dataclass(frozen=True)
class Case:
    """Options of one config on one model.

    Args:
        layer: a name of `LAYERS`, or what makes a model with `batch`.
        options: the config's; targets ``layer`` unless it says otherwise.
        gradients: False where PEFT's own are known to be wrong.
        merges: False where PEFT cannot merge.
        loose: keys of the saved config in which PEFT is known to be careless.
    """

    layer: str | Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    gradients: bool = True
    merges: bool = True
    loose: tuple[str, ...] = ()

    def model(self) -> Any:
        """The base model, seeded, in float64."""
        torch.manual_seed(3)
        maker = LAYERS[self.layer] if isinstance(self.layer, str) else self.layer
        return maker().double().eval()


class AgreesWithPeft:
    """The checks; a subclass names the config's class and its cases."""

    kind: ClassVar[str]
    cases: ClassVar[Mapping[str, Case]]
    noise: ClassVar[float] = 0.3
    """Size of the random values that the adapter is filled with."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Parts of PEFT's names in memory, and what stands there in ours."""
    only_theirs: ClassVar[str] = "(nothing)"
    """Part of the names of what PEFT trains by mistake."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases.values(), ids=list(self.cases))

    def options(self, case: Case) -> dict[str, Any]:
        """The config's options, with the class and the target filled in."""
        return {"kind": self.kind, "target_modules": ["layer"], **case.options}

    def ours(self, case: Case) -> Any:
        """A new model of ours."""
        return multigraft.get_peft_model(case.model(), our_config(self.options(case))).eval()

    def theirs(self, case: Case) -> Any:
        """A new model of PEFT's."""
        with quiet():
            return peft.get_peft_model(case.model(), peft_config(self.options(case))).eval()

    def both(self, case: Case) -> tuple[Any, Any]:
        """The same adapter with the same random values in both libraries."""
        ours, theirs = self.ours(case).double(), self.theirs(case).double()
        state = filled(peft_state(theirs), self.noise)
        with quiet():
            peft.set_peft_model_state_dict(theirs, state)
        multigraft.set_peft_model_state_dict(ours, state)
        return ours, theirs

    def test_outputs_agree(self, case: Case) -> None:
        ours, theirs = self.both(case)
        x = case.model().batch()
        near(ours(x), theirs(x))
        assert not torch.allclose(ours(x), case.model()(x), atol=1e-4), "the adapter does nothing"

    def test_gradients_agree(self, case: Case) -> None:
        """With PEFT's; where those are known to be wrong, with finite differences."""
        ours, theirs = self.both(case)
        first, second = gradients(ours, case), gradients(theirs, case)
        second = {name: g for name, g in second.items() if self.only_theirs not in name}
        for part, own in self.renamed.items():
            second = {name.replace(part, own): g for name, g in second.items()}
        assert sorted(first) == sorted(second)
        if not case.gradients:
            assert_true_gradients(ours, case)
            assert any(not torch.allclose(g, second[n]) for n, g in first.items())
            return
        for name, gradient in first.items():
            near(gradient, second[name], name)

    def test_merged_models_agree(self, case: Case) -> None:
        ours, theirs = self.both(case)
        x = case.model().batch()
        before = ours(x)
        own, other = ours.merge_and_unload(), self.merged(theirs, case)
        near(own(x), before)
        if other is not None:
            for (name, tensor), (_, expected) in zip(
                own.state_dict().items(), other.state_dict().items(), strict=True
            ):
                near(tensor, expected, name)

    @staticmethod
    def merged(theirs: Any, case: Case) -> Any:
        """PEFT's merged base, where it has one."""
        if not case.merges:
            return None
        with quiet():
            return theirs.merge_and_unload()

    def test_unmerging_restores_the_bits(self, case: Case) -> None:
        ours, _ = self.both(case)
        base = ours.get_base_model()
        before = fingerprint(base).bits
        ours.merge_adapter()
        assert fingerprint(base).bits != before
        ours.unmerge_adapter()
        assert fingerprint(base).bits == before

    def test_both_write_the_same_files(self, case: Case, tmp_path: Path) -> None:
        ours, theirs = self.both(case)
        written, expected = self.saved(ours, theirs, tmp_path)
        assert sorted(written) == sorted(expected)
        for key, value in written.items():
            assert value.dtype == expected[key].dtype, key
            assert torch.equal(value, expected[key]), key
        first, second = config_at(tmp_path / "ours"), config_at(tmp_path / "theirs")
        for key in case.loose:
            assert first.pop(key) != second.pop(key)
        assert first == second

    def test_each_loads_what_the_other_saves(
        self, case: Case, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        ours, theirs = self.both(case)
        self.saved(ours, theirs, tmp_path)
        x = case.model().batch()
        with quiet():
            there = peft.PeftModel.from_pretrained(case.model(), tmp_path / "ours").eval()
        near(there.double()(x), ours(x))
        recwarn.clear()
        here = multigraft.PeftModel.from_pretrained(case.model(), tmp_path / "theirs").eval()
        assert [w for w in recwarn if issubclass(w.category, MultigraftWarning)] == []
        near(here.double()(x), theirs(x))

    def saved(self, ours: Any, theirs: Any, folder: Path) -> tuple[dict[str, Tensor], ...]:
        """Save both models; the tensors of ``ours`` and of ``theirs``."""
        ours.save_pretrained(folder / "ours")
        with quiet():
            theirs.save_pretrained(folder / "theirs")
        return tensors_at(folder / "ours"), tensors_at(folder / "theirs")


class DropsLikePeft(AgreesWithPeft):
    """For methods whose dropout draws the same numbers from a seed in both libraries."""

    dropping: ClassVar[Mapping[str, Case]]
    """Cases with dropout, which are tried in training."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "drops" in metafunc.fixturenames:
            metafunc.parametrize("drops", self.dropping.values(), ids=list(self.dropping))

    def test_dropout_in_training_agrees_under_a_seed(self, drops: Case) -> None:
        ours, theirs = self.both(drops)
        x = drops.model().batch()
        whole = ours(x)
        ours.train(), theirs.train()
        outputs = set()
        for seed in range(4):
            torch.manual_seed(seed)
            own = ours(x)
            torch.manual_seed(seed)
            near(own, theirs(x), f"seed {seed}")
            outputs.add(own.detach().numpy().tobytes())
        assert len(outputs) > 1, "nothing is dropped"
        ours.eval()
        assert torch.equal(ours(x), whole)

    def test_nothing_is_dropped_in_merging_in_training(self, drops: Case) -> None:
        ours, _ = self.both(drops)
        x = drops.model().batch()
        whole = ours(x)
        near(ours.train().merge_and_unload().eval()(x), whole)


class StartsLikePeft(AgreesWithPeft):
    """For methods whose initial values follow from the seed in both libraries alike."""

    def test_initial_values_agree_under_a_seed(self, case: Case) -> None:
        base, twin = case.model().float(), case.model().float()
        torch.manual_seed(11)
        ours = multigraft.get_peft_model(base, our_config(self.options(case)))
        with quiet():
            torch.manual_seed(11)
            theirs = peft.get_peft_model(twin, peft_config(self.options(case)))
        own = multigraft.get_peft_model_state_dict(ours)
        expected = peft_state(theirs)
        assert sorted(own) == sorted(expected)
        for key, value in own.items():
            near(value, expected[key], key)


def filled(state: Mapping[str, Tensor], noise: float) -> dict[str, Tensor]:
    """Tensors of the same names and shapes with seeded random values."""
    source = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(state[key].shape, generator=source, dtype=torch.float64).to(
            state[key].dtype
        )
        * noise
        for key in sorted(state)
    }


def gradients(model: Any, case: Case) -> dict[str, Tensor]:
    """Of the input and of every trainable parameter, by name in memory."""
    x = case.model().batch()
    y = model(x)
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape).sin()
    (y * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        found["input"] = x.grad
    missing = [n for n, g in found.items() if g is None]
    assert not missing, f"no gradient: {missing}"
    return {n: g for n, g in found.items() if g is not None}


def assert_true_gradients(model: Any, case: Case) -> None:
    """Autograd's gradients of every trainable parameter against finite differences."""
    named = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    named = {n: p for n, p in named.items() if model.get_parameter(n).requires_grad}
    x = case.model().batch()

    def run(*values: Tensor) -> Tensor:
        y: Tensor = functional_call(model, dict(zip(named, values, strict=True)), (x,))
        return y

    assert gradcheck(run, tuple(named.values()), fast_mode=True)


def near(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """Equal up to the rounding of the narrower of the two dtypes."""
    narrow = min((ours.dtype, theirs.dtype), key=lambda d: d.itemsize)
    eps = torch.finfo(narrow).eps
    torch.testing.assert_close(
        ours.double(),
        theirs.double(),
        atol=math.sqrt(eps) * 1e-2,
        rtol=math.sqrt(eps) * 1e-2,
        msg=lambda text: f"{what}: {text}",
    )


def tensors_at(directory: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config_at(directory: Path) -> dict[str, Any]:
    """The config of a saved adapter, with PEFT's sets in a fixed order."""
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            config[key] = sorted(value)
    return config
