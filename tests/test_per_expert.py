"""Files of single experts' pairs load onto fused experts, with the same outputs as in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multigraft import CheckpointError, PeftModel
from multigraft.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.bases.nets import ids, mixtral, qwen, seeded
from tests.laws import fingerprint
from tests.oracle import quiet

Maker = Callable[[], nn.Module]
LAYOUTS: dict[str, tuple[Maker, str, tuple[str, str, str], int, int]] = {
    # model, block, (gate, up, down), experts, intermediate size
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2"), 3, 24),
    "qwen3_moe": (qwen, "mlp", ("gate_proj", "up_proj", "down_proj"), 4, 12),
}


def old_state(layout: str, rank: int = 2, router: bool = False) -> dict[str, Tensor]:
    """What a file of transformers 4's layout holds, for experts, attention and router."""
    _, block, (gate, up, down), experts, wide = LAYOUTS[layout]
    source, state = torch.Generator().manual_seed(0), {}

    def pair(path: str, in_: int, out: int) -> None:
        key = f"base_model.model.model.layers.{path}"
        state[f"{key}.lora_A.weight"] = torch.randn(rank, in_, generator=source) * 0.3
        state[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=source) * 0.3

    for layer in range(2):
        pair(f"{layer}.self_attn.q_proj", 16, 16)
        if router:
            pair(f"{layer}.{block}.gate", 16, experts)
        for expert in range(experts):
            for name in (gate, up):
                pair(f"{layer}.{block}.experts.{expert}.{name}", 16, wide)
            pair(f"{layer}.{block}.experts.{expert}.{down}", wide, 16)
    return state


def saved(folder: Path, layout: str, state: dict[str, Tensor], **more: Any) -> Path:
    """A folder as PEFT wrote it then."""
    targets = [*LAYOUTS[layout][2], "q_proj"]
    options = {"target_modules": targets, "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **more}
    peft.LoraConfig(**options).save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**ids()).logits


def dense(layout: str, state: dict[str, Tensor], scale: Any = 3.0) -> nn.Module:
    """The truth: the base with each expert's update added to its part of the stacks."""
    maker, block, (gate, up, down), experts, wide = LAYOUTS[layout]
    model = seeded(maker)

    def delta(path: str) -> Tensor:
        key = f"base_model.model.model.layers.{path}"
        own = scale(path) if callable(scale) else scale
        A, B = state.get(f"{key}.lora_A.weight"), state.get(f"{key}.lora_B.weight")
        return torch.zeros(()) if A is None or B is None else own * B @ A

    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight += delta(f"{index}.self_attn.q_proj")
            layer.mlp.gate.weight += delta(f"{index}.{block}.gate")
            for expert in range(experts):
                path = f"{index}.{block}.experts.{expert}"
                layer.mlp.experts.gate_up_proj[expert, :wide] += delta(f"{path}.{gate}")
                layer.mlp.experts.gate_up_proj[expert, wide:] += delta(f"{path}.{up}")
                layer.mlp.experts.down_proj[expert] += delta(f"{path}.{down}")
    return model


@pytest.mark.parametrize("router", [False, True], ids=["experts", "router"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_the_single_experts(layout: str, router: bool, tmp_path: Path):
    state = old_state(layout, router=router)
    targets = [*LAYOUTS[layout][2], "q_proj", *(["gate"] if router else [])]
    saved(tmp_path, layout, state, target_modules=targets)
    ours = PeftModel.from_pretrained(seeded(LAYOUTS[layout][0]), tmp_path)
    torch.testing.assert_close(logits(ours), logits(dense(layout, state)), atol=1e-5, rtol=1e-4)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(seeded(LAYOUTS[layout][0]), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_loaded_is_saved_in_the_layout_of_today(layout: str, tmp_path: Path):
    saved(tmp_path / "old", layout, old_state(layout))
    ours = PeftModel.from_pretrained(seeded(LAYOUTS[layout][0]), tmp_path / "old")
    ours.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(seeded(LAYOUTS[layout][0]), tmp_path / "new")
    assert torch.equal(logits(again), logits(ours))
    with quiet():
        theirs = peft.PeftModel.from_pretrained(seeded(LAYOUTS[layout][0]), tmp_path / "new")
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(w1|w2|w3|q_proj)"])
def test_however_the_config_named_them(targets: str, tmp_path: Path):
    state = old_state("mixtral")
    saved(tmp_path, "mixtral", state, target_modules=targets)
    ours = PeftModel.from_pretrained(seeded(mixtral), tmp_path)
    torch.testing.assert_close(logits(ours), logits(dense("mixtral", state)), atol=1e-5, rtol=1e-4)


def test_ranks_and_scales_that_differ_from_expert_to_expert(tmp_path: Path):
    state = old_state("mixtral")
    source = torch.Generator().manual_seed(1)
    for key in list(state):
        if ".experts.1.w1." in key:  # of rank 5
            shape = (5, 16) if "lora_A" in key else (24, 5)
            state[key] = torch.randn(shape, generator=source) * 0.3
    patterns = {"rank_pattern": {r"experts\.1\.w1": 5}, "alpha_pattern": {"w3": 2}}
    saved(tmp_path, "mixtral", state, use_rslora=True, **patterns)

    def scale(path: str) -> float:
        rank, alpha = (5 if path.endswith("experts.1.w1") else 2), (2 if path.endswith("w3") else 6)
        return alpha / rank**0.5

    ours = PeftModel.from_pretrained(seeded(mixtral), tmp_path)
    truth = logits(dense("mixtral", state, scale))
    torch.testing.assert_close(logits(ours), truth, atol=1e-5, rtol=1e-4)


def test_parts_and_experts_that_were_not_adapted_are_left_alone(tmp_path: Path):
    state = {k: v for k, v in old_state("mixtral").items() if ".w3." not in k and "s.2." not in k}
    saved(tmp_path, "mixtral", state, target_modules=["w1", "w2", "q_proj"])
    ours = PeftModel.from_pretrained(seeded(mixtral), tmp_path)
    torch.testing.assert_close(logits(ours), logits(dense("mixtral", state)), atol=1e-5, rtol=1e-4)


def test_modules_of_the_same_names_elsewhere_keep_their_own(tmp_path: Path):
    state = old_state("qwen3_moe")
    saved(tmp_path, "qwen3_moe", state)
    base = seeded(qwen)
    layer = base.model.layers[1]
    layer.mlp.shared_expert = nn.ModuleDict({"up_proj": nn.Linear(16, 12)})
    key = "base_model.model.model.layers.1.mlp.shared_expert.up_proj.lora_"
    state |= {f"{key}A.weight": torch.ones(2, 16), f"{key}B.weight": torch.ones(12, 2)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    ours = PeftModel.from_pretrained(base, tmp_path)
    assert "model.layers.1.mlp.shared_expert.up_proj" in ours.peft_config["default"].target_modules
    held = layer.mlp.shared_expert["up_proj"].lora_A["default"].weight
    assert torch.equal(held, torch.ones(2, 16))


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one of a pair": (lambda s: s.pop(next(k for k in s if "w1.lora_A" in k)), "alone"),
    "a shape": (
        lambda s: s.update({k: s[k][:, 1:].clone() for k in s if "w2.lora_A" in k}),
        "do not fit",
    ),
    "too many experts": (
        lambda s: s.update(
            {k.replace("experts.2", "experts.7"): s.pop(k) for k in list(s) if "experts.2" in k}
        ),
        "which has 3 experts",
    ),
    "a magnitude": (
        lambda s: s.update(
            {
                next(iter(k for k in s if "w1" in k)).replace(
                    "lora_A.weight", "lora_magnitude_vector"
                ): torch.ones(24)
            }
        ),
        "only plain pairs",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_stacked_is_refused_and_changes_nothing(damage, message, tmp_path: Path):
    state = old_state("mixtral")
    damage(state)
    saved(tmp_path, "mixtral", state)
    base = seeded(mixtral)
    before = fingerprint(base)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert fingerprint(base) == before


def test_a_file_without_experts_is_read_as_ever(tmp_path: Path):
    state = {k: v for k, v in old_state("mixtral").items() if "q_proj" in k}
    saved(tmp_path, "mixtral", state, target_modules=["q_proj"])
    ours = PeftModel.from_pretrained(seeded(mixtral), tmp_path)
    assert ours.peft_config["default"].target_modules == ["q_proj"]
    assert ours.peft_config["default"].target_parameters is None


def test_they_are_swapped_in_too(tmp_path: Path):
    small, large = old_state("mixtral"), old_state("mixtral", rank=3)
    saved(tmp_path / "small", "mixtral", small)
    saved(tmp_path / "large", "mixtral", large, r=3, lora_alpha=9)
    model = PeftModel.from_pretrained(seeded(mixtral), tmp_path / "small")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, tmp_path / "large", "default")
    torch.testing.assert_close(logits(model), logits(dense("mixtral", large)), atol=1e-5, rtol=1e-4)
