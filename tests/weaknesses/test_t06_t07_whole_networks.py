"""T6, T7, T9 in whole networks: what reads tensors agrees in training, evaluation and merged.

Nothing is left behind either: not after a forward, nor one that fails, nor one that is recomputed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multigraft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from tests.bases.attentions import X, encoder
from tests.bases.nets import Stacked, fill, seeded
from tests.laws import fingerprint


class Translator(nn.Module):
    """Torch's whole encoder-decoder, and a recurrent layer that keeps its weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
        self.memory = nn.GRU(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 8) to (batch, tokens, 3)."""
        return self.head(self.memory(self.body(x, x.flip(1)))[0])


WHOLE: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["linear1", "linear2", "out_proj"]},
    "everything linear": {"target_modules": "all-linear"},
    "attentions": {"target_modules": ["self_attn", "multihead_attn"]},
    "parameters": {"target_modules": [], "target_parameters": ["weight_ih_l0", "in_proj_weight"]},
}


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """In training and in evaluation, where torch takes its fast paths."""
    trained = model.train()(X)
    with torch.no_grad():
        return trained, model.eval()(X)


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_training_evaluation_and_merging_agree(options: dict[str, Any]):
    base = seeded(Translator)
    plain, before = base.eval()(X), fingerprint(base)
    model = get_peft_model(base, LoraConfig(r=2, **options))
    fill(model)
    trained, evaluated = outputs(model)
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-4)
    assert (evaluated - plain).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model.eval()(X), evaluated, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(X), plain)
    model.unload()
    assert fingerprint(base.eval()) == before


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_every_tensor_of_an_adapter_is_trained(options: dict[str, Any]):
    model = get_peft_model(seeded(Translator), LoraConfig(r=2, **options)).train()
    fill(model)
    model(X).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(g is not None and g.abs().max() > 0 for g in grads.values())


CONFIGS = {
    "DoRA": LoraConfig(use_dora=True),
    "IA3": IA3Config(feedforward_modules=[]),
    "OFT": OFTConfig(oft_block_size=4),
    "LoHa": LoHaConfig(r=2),
    "AdaLoRA": AdaLoraConfig(total_step=9),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_fast_path_serves_every_method(config: Any):
    config = config.copy()
    config.target_modules = ["linear1", "linear2", "out_proj"]
    model = get_peft_model(seeded(encoder), config)
    fill(model)
    trained, evaluated = outputs(model)
    torch.testing.assert_close(trained, evaluated, atol=1e-4, rtol=1e-4)
    assert (evaluated - seeded(encoder)(X)).abs().max() > 1e-3


def test_adapters_change_places_on_the_fast_path():
    model = get_peft_model(seeded(encoder), LoraConfig(target_modules=["linear1"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["linear1", "out_proj"]))
    alone = []
    for seed, name in enumerate("ab"):
        fill(model, name, seed)
        model.set_adapter(name)
        alone.append(outputs(model)[1])
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    model.set_adapter("a")
    assert torch.equal(outputs(model)[1], alone[0])
    model.set_adapter(["a", "b"])
    trained, evaluated = outputs(model)
    torch.testing.assert_close(trained, evaluated)


def test_t9_a_forward_that_fails_leaves_nothing_behind():
    config = LoraConfig(target_modules=[], target_parameters=["experts.up", "experts.mix"])
    model = get_peft_model(seeded(Stacked), config)
    fill(model)
    x = torch.randn(4, 6)
    y, before = model(x), fingerprint(model)
    for wrong in (torch.randn(4, 5), torch.randn(4, 6).to(torch.float64), None):
        with pytest.raises((RuntimeError, TypeError, AttributeError)):
            model(wrong)
        assert fingerprint(model) == before
    assert torch.equal(model(x), y)


def test_t9_training_steps_and_recomputation_leave_the_base_alone():
    base = seeded(Stacked)
    bits = fingerprint(base).bits
    model = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["experts.up"]))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    x = torch.randn(4, 6)
    for _ in range(3):
        checkpoint(model, x, use_reentrant=False).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.unload()
    assert fingerprint(base).bits == bits
