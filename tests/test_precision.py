"""Float32 adapters on a half-precision base: who has which dtype, and what is never made wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import multigraft
from multigraft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests.oracle import Net, build, our_config, peft_config, quiet

BASES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CONFIG = {"target_modules": ["lin0", "conv1", "emb"], "r": 4}
EVERY: dict[str, dict[str, Any]] = {
    "lora": CONFIG,
    "dora": {**CONFIG, "use_dora": True},
    "saved modules": {"target_modules": ["lin0"], "modules_to_save": ["head"]},
    "ia3": {"kind": "IA3Config", "target_modules": ["lin0"], "feedforward_modules": []},
    "vera": {"kind": "VeraConfig", "target_modules": ["lin0"], "r": 4},
}


def dtypes(model: Any, adapter: str) -> dict[str, torch.dtype]:
    """Of one adapter's tensors, by name on disk."""
    library = multigraft if isinstance(model, PeftModel) else peft
    with quiet():
        state = library.get_peft_model_state_dict(model, adapter_name=adapter)
    return {key: tensor.dtype for key, tensor in state.items() if "base_layer" not in key}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", BASES)
def test_dtypes_of_adapters_are_pefts_however_they_come(
    dtype: torch.dtype, name: str, autocast: bool, tmp_path: Path
) -> None:
    """Made first, added beside, loaded first, loaded beside."""
    cast = {"autocast_adapter_dtype": autocast}
    found = []
    for library, make in ((multigraft, our_config), (peft, peft_config)):
        folder = tmp_path / library.__name__
        config = make(EVERY[name])
        with quiet():
            model = library.get_peft_model(build(Net).to(dtype), config, "a", **cast)
            model.add_adapter("b", make(EVERY[name]), **cast)
            model.save_pretrained(folder, selected_adapters=["a"])
            loaded = library.PeftModel.from_pretrained(
                build(Net).to(dtype), folder / "a", adapter_name="c", **cast
            )
            loaded.load_adapter(folder / "a", "d", **cast)
        found.append(
            [dtypes(m, n) for m, n in ((model, "a"), (model, "b"), (loaded, "c"), (loaded, "d"))]
        )
    assert found[0] == found[1]


def test_injected_adapters_have_the_bases_dtype_as_in_peft() -> None:
    ours, theirs = build(Net).bfloat16(), build(Net).bfloat16()
    inject_adapter_in_model(our_config(CONFIG), ours)
    peft.inject_adapter_in_model(peft_config(CONFIG), theirs)
    own, other = (m.lin0.lora_A["default"].weight.dtype for m in (ours, theirs))
    assert own == other == torch.bfloat16


class Widest(TorchDispatchMode):
    """Notes the sizes of tensors in float32 that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.sizes.append(tensor.numel())
        return given


TOKENS, WIDTH, RANK = 64, 32, 2
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (1, TOKENS, WIDTH)),
    "conv1d_transposed": (lambda: Conv1D(WIDTH, WIDTH), (1, TOKENS, WIDTH)),
    "conv": (lambda: nn.Conv1d(WIDTH, WIDTH, 1), (1, WIDTH, TOKENS)),
}


@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_no_activation_is_ever_made_float32(name: str, more: dict[str, Any]) -> None:
    """Forwards and backwards; PEFT makes each input float32."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    base = nn.Sequential(make(), nn.Identity()).bfloat16()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=RANK, **more)).train()
    x = torch.randn(shape).bfloat16().requires_grad_()
    with Widest() as mode:
        model(x).sum().backward()
    widest = max(mode.sizes, default=0)
    assert widest < TOKENS * WIDTH, f"a float32 tensor of {widest} elements"
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


def test_several_adapters_make_no_activation_float32_either() -> None:
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Identity()).bfloat16()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=RANK), "a")
    model.add_adapter("b", LoraConfig(target_modules=["0"], r=2 * RANK))
    model.set_adapter(["a", "b"])
    x = torch.randn(4, TOKENS, WIDTH).bfloat16().requires_grad_()
    for names in (None, ["a", "b", "__base__", "a"]):
        with Widest() as mode:
            model(x, **({"adapter_names": names} if names else {})).sum().backward()
        assert max(mode.sizes, default=0) < TOKENS * WIDTH


def test_the_check_sees_pefts_casts() -> None:
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Identity()).bfloat16()
    model = peft.get_peft_model(base, peft_config({"target_modules": ["0"], "r": RANK}))
    with Widest() as mode:
        model(torch.randn(1, TOKENS, WIDTH).bfloat16())
    assert max(mode.sizes) == TOKENS * WIDTH
