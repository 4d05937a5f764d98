"""Small models and adapters on disk, and what merging them in memory gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft import PeftConfig, PeftModel, get_peft_model
from multigraft.train import load_base

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def write_llama(
    folder: Path, *, tied: bool = False, dtype: str = "float32", shard: str = "50GB", **more: Any
) -> Path:
    """A Llama of some thousand parameters, as `save_pretrained` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **more}, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def write_gpt2(folder: Path) -> Path:
    """GPT-2, whose linear layers are stored transposed, and whose head is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, config: PeftConfig, *, name: str = "default", seed: int = 1
) -> Path:
    """An adapter with random values for a base, as training would leave it."""
    model = get_peft_model(load_base(base), config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.roster.parameters(name):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    model.save_pretrained(folder)
    return folder


def merged_in_memory(base: Path, *adapters: Path) -> nn.Module:
    """What `merge_and_unload` makes of the same adapters."""
    model = PeftModel.from_pretrained(load_base(base), adapters[0], "a0")
    for number, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, f"a{number}")
    names = [f"a{n}" for n in range(len(adapters))]
    return model.eval().merge_and_unload(adapter_names=names)


def require_same(folder: Path, wanted: nn.Module) -> None:
    """Fail unless the model in a folder has these very bits."""
    found, expected = load_base(folder).state_dict(), wanted.state_dict()
    assert found.keys() == expected.keys()
    different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not different, different


def logits(model: nn.Module) -> Tensor:
    """Of a fixed row of tokens."""
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def write_mixtral(folder: Path) -> Path:
    """A mixture of experts, whose files hold each expert by itself."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**SIZES, **experts)).save_pretrained(folder)
    return folder
