"""`runtime_config`: where a new adapter's first values are computed; no file holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from multigraft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from multigraft.variants import _runtime, dora
from tests.oracle import quiet

EPHEMERAL = LoraRuntimeConfig(ephemeral_gpu_offload=True)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 3, 2))


def magnitudes(**more: Any) -> list[torch.Tensor]:
    config = LoraConfig(
        target_modules=["0", "1"], use_dora=True, r=2, init_lora_weights=False, **more
    )
    torch.manual_seed(1)
    model = get_peft_model(base(), config)
    return [p.detach() for n, p in model.named_parameters() if "magnitude" in n]


class Elsewhere:
    """Stands for an accelerator, on a machine without one; notes what is computed there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.norms = 0
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        cpu = torch.device("cpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: cpu)
        compute = dora._norm_on

        def noted(device: torch.device, *args: Any) -> torch.Tensor:
            assert device is cpu
            self.norms += 1
            return compute(device, *args)

        monkeypatch.setattr(dora, "_norm_on", noted)


def test_first_norms_are_computed_on_the_accelerator_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = Elsewhere(monkeypatch)
    plain = magnitudes()
    assert elsewhere.norms == 0
    lent = magnitudes(runtime_config=EPHEMERAL)
    assert elsewhere.norms == len(lent) == 2
    for a, b in zip(plain, lent, strict=True):
        torch.testing.assert_close(a, b)


def test_without_an_accelerator_nothing_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    pairs = zip(magnitudes(), magnitudes(runtime_config=EPHEMERAL), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_lies_on_a_device_already_is_not_lent() -> None:
    config = LoraConfig(runtime_config=EPHEMERAL)
    assert _runtime.borrowed(config, torch.device("cuda")) is None
    assert _runtime.borrowed(LoraConfig(), torch.device("cpu")) is None


def test_the_values_are_pefts() -> None:
    config: dict[str, Any] = {"target_modules": ["0"], "use_dora": True, "init_lora_weights": False}
    runtime = peft.LoraRuntimeConfig(ephemeral_gpu_offload=torch.accelerator.is_available())
    torch.manual_seed(1)
    with quiet():
        theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, runtime_config=runtime, **config))
    torch.manual_seed(1)
    ours = get_peft_model(base(), LoraConfig(r=2, runtime_config=EPHEMERAL, **config))
    own, other = (
        next(p.detach() for n, p in model.named_parameters() if "magnitude" in n)
        for model in (ours, theirs)
    )
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_no_file_holds_it(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0"], runtime_config=EPHEMERAL)
    get_peft_model(base(), config).save_pretrained(tmp_path)
    assert "runtime_config" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert loaded.peft_config["default"].runtime_config == LoraRuntimeConfig()


def test_the_users_object_is_not_the_models() -> None:
    mine = LoraRuntimeConfig()
    model = get_peft_model(base(), LoraConfig(target_modules=["0"], runtime_config=mine))
    mine.ephemeral_gpu_offload = True
    assert not model.peft_config["default"].runtime_config.ephemeral_gpu_offload
