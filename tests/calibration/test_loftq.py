"""LoftQ on a quantised base: factors from the file of the weights before, as in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multigraft import (
    CheckpointError,
    LoraConfig,
    StateError,
    TargetError,
    get_peft_model,
    replace_lora_weights_loftq,
)
from tests.initialisations.nets import factors, net, off, options
from tests.initialisations.on_cpu import without_a_gpu
from tests.laws import fingerprint
from tests.oracle import quiet

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["0", "1"]}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).requires_grad_(False)


def quantised() -> Any:
    """The same in nf4."""
    model = plain()
    for index, layer in enumerate(list(model)):
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
        packed.load_state_dict(layer.state_dict())
        model[index] = packed.to("cpu")
    model.is_loaded_in_4bit = True  # PEFT looks at this, we at the weights
    return model.eval()


def x() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def adapted(**more: Any) -> Any:
    return get_peft_model(quantised(), LoraConfig(**OPTIONS | more)).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(plain().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_factors_are_pefts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_gpu(monkeypatch)
    model = adapted()
    with quiet():
        other = peft.get_peft_model(quantised(), peft.LoraConfig(**OPTIONS))
        peft.replace_lora_weights_loftq(other, str(file))
    replace_lora_weights_loftq(model, file)
    for path in ("0", "1"):
        (A, B), (A2, B2) = factors(model, path), factors(other, path)
        assert off(B @ A, B2 @ A2) < 1e-4


@pytest.mark.parametrize("alpha", [4, 16])
def test_the_adapter_brings_the_output_nearer_to_that_before(file: Path, alpha: int) -> None:
    model, expected = adapted(r=16, lora_alpha=alpha), plain()(x())
    before = (model(x()) - expected).norm()
    replace_lora_weights_loftq(model, file)
    assert (model(x()) - expected).norm() < 0.8 * before


def test_a_folder_with_split_files_does_as_well(tmp_path: Path, file: Path) -> None:
    whole = adapted()
    replace_lora_weights_loftq(whole, file)
    split = tmp_path / "split"
    split.mkdir()
    state = {f"model.{key}": value for key, value in plain().state_dict().items()}
    table = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(table.values()):
        save_file({k: v for k, v in state.items() if table[k] == name}, split / name)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    model = adapted()
    model.get_base_model().base_model_prefix = "model"
    replace_lora_weights_loftq(model, split)
    assert torch.equal(factors(model, "1")[0], factors(whole, "1")[0])


def test_a_callback_that_says_no_sets_the_layer_back(file: Path) -> None:
    model = adapted()
    before = {path: [t.clone() for t in factors(model, path)] for path in ("0", "1")}
    seen = []

    def callback(given: nn.Module, name: str) -> bool:
        assert given is model
        seen.append(name)
        return name == "1"

    replace_lora_weights_loftq(model, file, callback=callback)
    assert seen == ["0", "1"]
    kept, changed = factors(model, "0"), factors(model, "1")
    assert all(torch.equal(a, b) for a, b in zip(kept, before["0"], strict=True))
    assert not torch.equal(changed[1], before["1"][1])


def test_files_that_do_not_fit_are_refused_and_nothing_changes(tmp_path: Path, file: Path) -> None:
    model = adapted()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        replace_lora_weights_loftq(model, tmp_path / "none")
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        replace_lora_weights_loftq(model, tmp_path / "bad.safetensors")
    save_file({"9.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"`model_path` holds no `0\.weight`"):
        replace_lora_weights_loftq(model, tmp_path / "other.safetensors")
    save_file({"0.weight": torch.ones(2, 2)}, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"0.weight is \(2, 2\) in the file and \(64, 64\)"):
        replace_lora_weights_loftq(model, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"has no local copy .* Give `model_path`"):
        replace_lora_weights_loftq(model)
    assert fingerprint(model) == before


def test_models_without_a_quantised_layer_are_refused(file: Path) -> None:
    model = get_peft_model(net(), LoraConfig(**options(True)))
    with pytest.raises(TargetError, match="no linear layer of adapter `default` is quantised"):
        replace_lora_weights_loftq(model, file)
    with pytest.raises(StateError, match=r"`peft_model` \(=Net\) must be a PeftModel"):
        replace_lora_weights_loftq(net(), file)


def test_a_merged_adapter_is_refused(file: Path) -> None:
    model = adapted(init_lora_weights=False)
    model.merge_adapter()
    with pytest.raises(StateError, match="is merged; call unmerge_adapter"):
        replace_lora_weights_loftq(model, file)
