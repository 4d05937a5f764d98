"""A tiny base model and adapters for it, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

import multigraft as mg
from multigraft.generation import Ensemble, load_ensemble
from tests.merging.models import write_adapter
from tests.tiny_base import write_base


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs, an IA3, and a prompt, which cannot share a batch with the others."""
    root = tmp_path_factory.mktemp("adapters")
    lora = mg.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    prompt = mg.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ia3 = mg.IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    configs = {"first": lora, "second": lora, "scaled": ia3, "prompted": prompt}
    return {
        name: write_adapter(root / name, base_dir, config, seed=seed)
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="session")
def ensemble(base_dir: Path, adapters: dict[str, Path]) -> Ensemble:
    return load_ensemble(list(adapters.values()), base=base_dir)
