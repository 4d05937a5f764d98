"""Bytes that real steps on the CPU take, measured in ways that share nothing with the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from multigraft import PeftConfig, get_peft_model
from multigraft.planning.skeleton import checkpoint_blocks


def without_dropout(config: Any) -> Any:
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout_rate"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def trainable(base: nn.Module, adapters: dict[str, PeftConfig], checkpointed: bool) -> Any:
    """The model of a run: on a frozen base, in training, all adapters thawed."""
    if checkpointed:
        checkpoint_blocks(base)
    model: Any = base
    for name, config in adapters.items():
        if model is base:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
    model.roster.set_requires_grad(list(adapters), True)
    return model.train()


def batch_of(model: Any, names: list[str], rows: int, tokens: int) -> dict[str, Any]:
    """Rows of which the first is padded."""
    generator = torch.Generator().manual_seed(0)
    size = (rows * len(names), tokens)
    ids = torch.randint(1, model.config.vocab_size, size, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids
    if hasattr(model.config, "use_cache"):
        found["use_cache"] = False
    if len(names) > 1:
        found["adapter_names"] = [name for name in names for _ in range(rows)]
    return found


def kept(model: nn.Module, batch: dict[str, Any], blocks: type[nn.Module] | None = None) -> int:
    """Bytes of what the graph of a forward keeps, of what was made in it.

    Args:
        blocks: what is checkpointed; the inputs of these are kept besides.
    """
    before = [*model.parameters(), *model.buffers(), *tree_leaves(batch)]
    known = {t.untyped_storage().data_ptr() for t in before if isinstance(t, Tensor)}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(value: Any) -> Any:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    found[storage.data_ptr()] = storage
        return value

    def note_leaf(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad:
                note(tensor)  # an embedding's output that was made to require a gradient

    hooks = [
        module.register_forward_pre_hook(lambda m, a, k: note((a, k)) and None, with_kwargs=True)
        for module in model.modules()
        if blocks is not None and isinstance(module, blocks)
    ]
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
    hooks += [module.register_forward_hook(note_leaf) for module in embeddings]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(**batch)
    for hook in hooks:
        hook.remove()
    del outputs
    return sum(storage.nbytes() for storage in found.values())


def peak(step: Any) -> int:
    """The most bytes that torch's CPU allocator had given out at once since ``step`` began."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    return most
