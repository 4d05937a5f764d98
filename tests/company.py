"""Adapters that train in one batch, and each of them alone, on small models in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multigraft import LoraConfig, PeftModel, get_peft_model
from multigraft.draws import Draw, per_adapter

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Own(NamedTuple):
    """One adapter and its part of the batch."""

    config: Any
    rows: int
    width: int

    def draw(self, seed: int) -> Draw:
        return Draw(seed, self.rows, self.width)

    def ids(self, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return torch.randint(1, 32, (self.rows, self.width), generator=source)


def lora(rank: int = 2, p: float = 0.5, **options: Any) -> LoraConfig:
    options = {"target_modules": EVERY, "init_lora_weights": False, **options}
    return LoraConfig(r=rank, lora_dropout=p, **options)


def llama(configs: Sequence[Any]) -> PeftModel:
    """A Llama of two layers in float64, with these adapters, all of which train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return adapted(LlamaForCausalLM(shape), configs)


def adapted(base: nn.Module, configs: Sequence[Any]) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base.double(), configs[0], "a0", autocast_adapter_dtype=False)
    for index, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{index}", config, autocast_adapter_dtype=False)
    names = [f"a{index}" for index in range(len(configs))]
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in names:
            for parameter in model.roster.parameters(name):
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter += noise / 4
    return model.double().train()


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def together(model: PeftModel, owns: Sequence[Own]) -> list[list[Tensor]]:
    """Each adapter's gradients, of one step of all of them."""
    width = max(own.width for own in owns)
    parts = [own.ids(seed) for seed, own in enumerate(owns)]
    ids = torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
    names = [f"a{index}" for index, own in enumerate(owns) for _ in range(own.rows)]
    model.base_model.set_requires_grad(list(dict.fromkeys(names)))
    with per_adapter({f"a{i}": own.draw(10 + i) for i, own in enumerate(owns)}):
        logits = model(input_ids=ids, attention_mask=(ids > 0).long(), adapter_names=names).logits
    start, losses = 0, []
    for part in parts:
        rows, tokens = part.shape
        losses.append(loss_of(logits[start : start + rows, :tokens], part))
        start += rows
    torch.stack(losses).sum().backward()
    return taken(model, len(owns))


def taken(model: PeftModel, adapters: int) -> list[list[Tensor]]:
    """The gradients of each of these adapters, which are gone afterwards."""
    names = [f"a{index}" for index in range(adapters)]
    found = [[p.grad for p in model.roster.parameters(n) if p.grad is not None] for n in names]
    model.zero_grad()
    return found


def alone(model: PeftModel, index: int, own: Own, routed: bool = False) -> list[Tensor]:
    """One adapter's gradients, of a step of its own."""
    ids, name = own.ids(index), f"a{index}"
    model.set_adapter(name)
    more = {"adapter_names": [name] * own.rows} if routed else {}
    with per_adapter({name: own.draw(10 + index)}):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    loss_of(logits, ids).backward()
    return taken(model, index + 1)[index]


def check(model: PeftModel, owns: Sequence[Own]) -> None:
    """What each adapter gets in company is what it gets alone."""
    mixed = together(model, owns)
    for index, own in enumerate(owns):
        single = alone(model, index, own)
        assert len(single) == len(mixed[index]) > 0
        assert any(grad.abs().max() > 1e-6 for grad in single)
        for one, other in zip(mixed[index], single, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
