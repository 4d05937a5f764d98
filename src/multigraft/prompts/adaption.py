"""Adaption prompt: the top layers' attention also attends to learned tokens, behind a gate.

    y = attention(x) + g * (softmax(q k(P)^T / sqrt(size)) v(P)) Wo
        P: (1, tokens, width), standard normal at first        g: (1,), zero at first
        q: of x, with its positions        k, v, Wo: the attention's own projections

Paper: Zhang et al. 2023, arXiv:2303.16199 (LLaMA-Adapter), section 3.
Departs: one gate per layer, as in PEFT, and not one per head; GPT-2's part goes past the output
projection, as in PEFT. Adaption prompts of several adapters add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from multigraft.config import PeftConfig, PeftType
from multigraft.containers import Leaf
from multigraft.errors import TargetError, UnsupportedError
from multigraft.prompts.config import require_count, tell
from multigraft.prompts.contract import Acting, Context, Slot, context
from multigraft.registry import TypeRegistry

TARGETS = {"gpt2": "attn", "llama": "self_attn", "mistral": "self_attn", "qwen2": "self_attn"}
"""What ``target_modules=None`` means, by ``model.config.model_type``."""


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """The options of adaption prompts, under PEFT's names.

    Args:
        target_modules: name of the attention modules; the architecture's usual one by default.
        adapter_len: how many tokens are learned at each layer.
        adapter_layers: how many layers, from the top.
    """

    peft_type: str | PeftType | None = PeftType.ADAPTION_PROMPT
    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(type(self).__name__, "adapter_len", self.adapter_len)
        require_count(type(self).__name__, "adapter_layers", self.adapter_layers)

    @property
    def is_adaption_prompt(self) -> bool:
        """As PEFT's configs answer."""
        return True


class Attention(Protocol):
    """What is asked of a kind of attention module; heads stand before tokens in every result."""

    def queries(self, module: nn.Module, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """(batch, heads, tokens, size), with the positions in them."""

    def keys_values(self, module: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """(1, heads, prompt tokens, size) each, of ``prompt`` (1, prompt tokens, width)."""

    def output(self, module: nn.Module, y: Tensor) -> Tensor:
        """(batch, tokens, width) of what was attended to (batch, tokens, heads * size)."""


ATTENTIONS: TypeRegistry[Attention] = TypeRegistry("attention that takes adaption prompts")


class Separate:
    """Four projections, rotary positions, and heads that share keys."""

    def queries(self, module: Any, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        cos, sin = (part.unsqueeze(1) for part in call["position_embeddings"])
        q = _heads(module.q_proj(x), module.head_dim)
        left, right = q.chunk(2, dim=-1)
        return q * cos + torch.cat((-right, left), dim=-1) * sin

    def keys_values(self, module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
        shared = module.num_key_value_groups
        k, v = (_heads(p(prompt), module.head_dim) for p in (module.k_proj, module.v_proj))
        return k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)

    def output(self, module: Any, y: Tensor) -> Tensor:
        projected: Tensor = module.o_proj(y)
        return projected


class Fused:
    """One projection for queries, keys and values; positions are in ``x`` already."""

    def queries(self, module: Any, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        return _heads(module.c_attn(x).chunk(3, dim=-1)[0], module.head_dim)

    def keys_values(self, module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = module.c_attn(prompt).chunk(3, dim=-1)
        return _heads(k, module.head_dim), _heads(v, module.head_dim)

    def output(self, module: Any, y: Tensor) -> Tensor:
        return y


ATTENTIONS.register(
    "transformers.models.llama.modeling_llama.LlamaAttention",
    "transformers.models.mistral.modeling_mistral.MistralAttention",
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention",
)(Separate())
ATTENTIONS.register("transformers.models.gpt2.modeling_gpt2.GPT2Attention")(Fused())


@context("ADAPTION_PROMPT", config=AdaptionPromptConfig, paper="arXiv:2303.16199")
class AdaptionPrompt(Context):
    """A prompt and a gate at each of the top attention modules, which hooks let act."""

    kind = "attention"

    def __init__(self, config: AdaptionPromptConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.modules_by_path = _attentions(config, model)
        self.hooks: list[RemovableHandle] = []
        width = tell(model, "hidden_size", "n_embd")
        size = 1, config.adapter_len or 0, width
        for path in self.modules_by_path:
            leaf = self._leaf(path)
            leaf.adaption_prompt = nn.Parameter(torch.empty(size))
            leaf.adaption_gate = nn.Parameter(torch.empty(1))

    @classmethod
    def complete(cls, config: AdaptionPromptConfig, model: nn.Module) -> None:
        if config.target_modules is None:
            kind = tell(model, "model_type")
            if kind not in TARGETS:
                raise UnsupportedError(
                    f"{cls.name}: no usual attention is known for `model_type` (={kind!r}); known "
                    f"are {', '.join(TARGETS)}. Name it in `target_modules`."
                )
            config.target_modules = TARGETS[kind]
        _attentions(config, model)

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        for path in self.modules_by_path:
            leaf = self._leaf(path)
            leaf.adaption_prompt.normal_()
            leaf.adaption_gate.zero_()

    def slots(self) -> dict[str, Slot]:
        return {
            f"{path}.{name}": (self._leaf(path), name)
            for path in self.modules_by_path
            for name in ("adaption_gate", "adaption_prompt")
        }

    def enter(self, roster: Acting, adapter: str) -> None:
        for path, module in self.modules_by_path.items():
            leaf = self._leaf(path)
            if not leaf.adaption_gate.is_meta:
                leaf.to(next(module.parameters()).device)
            hook = Hook(roster, adapter, leaf)
            self.hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def leave(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def _leaf(self, path: str) -> Any:
        """The holder of one layer's tensors, under the same path as the layer's own."""
        node: nn.Module = self
        for part in path.split("."):
            # Not by setattr: a part may be called as an attribute of this class is.
            node = node._modules.setdefault(part, Leaf())  # type: ignore[assignment]
        return node


class Hook:
    """What adds one layer's part to the attention's output, while the adapter acts."""

    def __init__(self, roster: Acting, adapter: str, leaf: Any) -> None:
        self.roster = roster
        self.adapter = adapter
        self.leaf = leaf

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
        if not self.roster.acts(self.adapter):
            return None
        x = args[0] if args else kwargs["hidden_states"]
        own = self.part(module, x, kwargs)
        return (result[0] + own, *result[1:])

    def part(self, module: nn.Module, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What is added to the attention's output ``(batch, tokens, width)``."""
        kind = ATTENTIONS.find(type(module))
        assert kind is not None, "found when the adapter was prepared"
        q = kind.queries(module, x, call)
        k, v = kind.keys_values(module, self.leaf.adaption_prompt.to(x.dtype))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        y = (self.leaf.adaption_gate * weights).to(q.dtype) @ v
        return kind.output(module, y.transpose(1, 2).flatten(2))


def _heads(x: Tensor, size: int) -> Tensor:
    """(batch, tokens, heads * size) to (batch, heads, tokens, size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _attentions(config: AdaptionPromptConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The topmost attention modules that the config means, by path, from below.

    Raises:
        TargetError: there are fewer, or one is of a kind that is not known.
    """
    name, count = config.target_modules, config.adapter_layers or 0
    found = {p: m for p, m in model.named_modules() if p.split(".")[-1] == name}
    if len(found) < count:
        raise TargetError(
            f"`adapter_layers` (={count}): {type(model).__name__} has {len(found)} modules called "
            f"`{name}`. Ask for at most as many, or set `target_modules`."
        )
    top = dict(list(found.items())[-count:])
    for path, module in top.items():
        if ATTENTIONS.find(type(module)) is None:
            known = ", ".join(name.rpartition(".")[2] for name, _ in ATTENTIONS.items())
            raise TargetError(
                f"ADAPTION_PROMPT cannot adapt {path} ({type(module).__name__}): it knows {known}. "
                "Name such modules in `target_modules`."
            )
    return top
