"""PEFT as the oracle: the same tiny model twice, one adapted by each library from one config.

Used by the differential tests alone; the library itself never imports PEFT.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import multigraft

VOCABULARY = 40
TOKENS = 8


class Net(nn.Module):
    """Every kind of layer that LoRA acts on, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.norm = nn.LayerNorm(16)
        self.lin0 = nn.Linear(16, 24)
        self.turned = Conv1D(16, 24)
        self.conv1 = nn.Conv1d(16, 16, 3, padding=1, stride=1)
        self.conv2 = nn.Conv2d(4, 8, (3, 2), padding=(1, 0), stride=(1, 2), groups=2)
        self.conv3 = nn.Conv3d(4, 4, (2, 1, 2), padding=(0, 0, 1), stride=(1, 2, 1), bias=False)
        self.lin1 = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(6, 3)
        for layer in (self.lin0, self.turned, self.conv1, self.conv2, self.conv3, self.lin1):
            # Wide enough for every layer's update to be seen at the output.
            nn.init.normal_(layer.weight, std=1.5 * layer.weight[0].numel() ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Token indices (batch, TOKENS) to (batch, 3)."""
        x = self.norm(self.emb(ids))
        x = self.turned(torch.relu(self.lin0(x))).transpose(1, 2)
        x = self.conv1(x).reshape(len(ids), 4, 4, TOKENS)
        x = torch.relu(self.conv2(x)).reshape(len(ids), 4, 2, 4, -1)
        x = self.conv3(x).flatten(2).mean(-1)
        return self.head(torch.tanh(self.lin1(x)))


KINDS = ["emb", "lin0", "turned", "conv1", "conv2", "conv3", "lin1"]
"""Names of `Net`'s layers, one of each kind at least."""


class Stack(nn.Module):
    """Numbered layers, with names that are alike, and a head."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict(  # noqa: E731
            {"q_proj": nn.Linear(8, 8), "my_q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}
        )
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) to (batch, 4)."""
        for layer in self.layers:
            for part in layer.values():
                x = torch.tanh(part(x))
        return self.head(x)


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(**_SIZES, **more)
    return transformers.LlamaForCausalLM(config)


def llama_classifier() -> nn.Module:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**_SIZES, num_labels=3)
    )


def gemma(**more: Any) -> nn.Module:
    """Its embedding multiplies what it looks up by `embed_scale`."""
    config = transformers.Gemma3TextConfig(**_SIZES, head_dim=8, **more)
    return transformers.Gemma3ForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def bert_config() -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
    return transformers.BertConfig(**sizes, num_labels=3)


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(bert_config())


def distilbert_classifier() -> nn.Module:
    """Its head has two layers, both of them fresh."""
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=32,
        num_labels=3,
    )
    return transformers.DistilBertForSequenceClassification(config)


def bert_tagger() -> nn.Module:
    return transformers.BertForTokenClassification(bert_config())


def bert_reader() -> nn.Module:
    config = bert_config()
    config.num_labels = 2
    return transformers.BertForQuestionAnswering(config)


def bert_encoder() -> nn.Module:
    return transformers.BertModel(bert_config())


def t5(tie_word_embeddings: bool = False) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=tie_word_embeddings,
    )
    return transformers.T5ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "llama": llama,
    "gemma": gemma,
    "gpt2": gpt2,
    "bert": bert_classifier,
    "t5": t5,
}


def build(maker: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model with seeded weights (biases too), in evaluation mode."""
    torch.manual_seed(seed)
    model = maker().eval()
    source = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=source) * 0.1)
    return model


def inputs(model: nn.Module, rows: int = 3, seed: int = 7) -> dict[str, Tensor]:
    """A batch that the model's forward takes; no token is padding."""
    source = torch.Generator().manual_seed(seed)
    if isinstance(base_of(model), Stack):
        return {"x": torch.randn(rows, 8, generator=source)}
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=source)
    if isinstance(base_of(model), Net):
        return {"ids": ids}
    if hasattr(model.config, "decoder_start_token_id") and model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside either library's handle."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def output(model: nn.Module, batch: Mapping[str, Tensor], **more: Any) -> Tensor:
    """The first tensor that the model's forward gives."""
    result = model(**batch, **more)
    return result if isinstance(result, Tensor) else result[0]


@dataclass
class Pair:
    """One base model's two copies: `ours` adapted by Multigraft, `theirs` by PEFT."""

    ours: Any
    theirs: Any
    batch: dict[str, Tensor]

    def outputs(self, **more: Any) -> tuple[Tensor, Tensor]:
        """(ours, theirs) for the pair's batch."""
        return output(self.ours, self.batch, **more), output(self.theirs, self.batch, **more)

    def assert_equal(self, atol: float = 1e-6, **more: Any) -> Tensor:
        """Both give the same output; returns it.

        Args:
            atol: relative to the largest output, when that is above one.
        """
        ours, theirs = self.outputs(**more)
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, atol=atol * scale, rtol=1e-5)
        return ours


def graft_pair(
    maker: Callable[[], nn.Module],
    config: Mapping[str, Any],
    *,
    adapter: str = "default",
    dtype: torch.dtype = torch.float32,
    fill: bool = True,
) -> Pair:
    """The same model adapted by both libraries from the same options, with the same weights.

    Args:
        fill: random values in every tensor of the adapter, so that it changes the output.
    """
    with quiet():
        theirs = peft.get_peft_model(build(maker).to(dtype), peft_config(config), adapter)
    ours = multigraft.get_peft_model(build(maker).to(dtype), our_config(config), adapter)
    pair = Pair(ours.eval(), theirs.eval(), {})
    pair.batch = inputs(ours)
    if fill:
        same_weights(pair, adapter)
    return pair


def add_to_both(pair: Pair, adapter: str, config: Mapping[str, Any], seed: int = 1) -> None:
    """One more adapter for both, with the same weights."""
    with quiet():
        pair.theirs.add_adapter(adapter, peft_config(config))
    pair.ours.add_adapter(adapter, our_config(config))
    pair.ours.eval(), pair.theirs.eval()
    same_weights(pair, adapter, seed)


def same_weights(pair: Pair, adapter: str = "default", seed: int = 0, std: float = 0.3) -> None:
    """Random values for one adapter, put into both models through their own functions."""
    state = random_state(peft_state(pair.theirs, adapter), seed, std)
    with quiet():
        peft.set_peft_model_state_dict(pair.theirs, state, adapter)
    multigraft.set_peft_model_state_dict(pair.ours, state, adapter)


def random_state(state: Mapping[str, Tensor], seed: int = 0, std: float = 0.3) -> dict[str, Tensor]:
    """Tensors of the same names and shapes, filled at random; copies of the base are kept."""
    source = torch.Generator().manual_seed(seed)
    fresh = {}
    for key in sorted(state):
        tensor = state[key]
        is_base_copy = ".base_layer.weight" in key or ".original_module." in key
        noise = torch.randn(tensor.shape, generator=source).to(tensor.dtype) * std
        fresh[key] = tensor.clone() if is_base_copy else noise
    return fresh


def plain_name(name: str) -> str:
    """A parameter's name in either model; a trained bias is a copy here, the base's own in PEFT."""
    return name.replace(".bias_copy_bias.default", ".bias").replace(".base_layer.", ".")


def gradients(model: Any) -> dict[str, Tensor]:
    return {plain_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


def train_step(pair: Pair) -> None:
    for model in (pair.ours, pair.theirs):
        model.zero_grad()
        output(model, pair.batch).square().mean().backward()


def assert_same_gradients(pair: Pair) -> None:
    """Every gradient is the same, relative to the largest of its tensor."""
    ours, theirs = gradients(pair.ours), gradients(pair.theirs)
    assert ours.keys() == theirs.keys()
    assert any(bool(g.abs().max() > 0) for g in ours.values())
    for name in ours:
        atol = 1e-7 + 1e-5 * float(theirs[name].abs().max())
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=1e-5, msg=name)


def peft_state(model: Any, adapter: str = "default", **more: Any) -> dict[str, Tensor]:
    """PEFT's state dict of one adapter."""
    with quiet():
        return dict(peft.get_peft_model_state_dict(model, adapter_name=adapter, **more))


def peft_config(config: Mapping[str, Any]) -> Any:
    """PEFT's config of these options; ``kind`` names the class, LoraConfig by default."""
    return _config_from(peft, config)


def our_config(config: Mapping[str, Any]) -> Any:
    """Multigraft's config of these options."""
    return _config_from(multigraft, config)


def _config_from(library: Any, config: Mapping[str, Any]) -> Any:
    options = copy.deepcopy(dict(config))
    return getattr(library, options.pop("kind", "LoraConfig"))(**options)


def our_sites(model: nn.Module, adapter: str = "default") -> set[str]:
    """Base paths whose weight one of our adapters changes."""
    return {
        layer.path
        for layer in base_of(model).modules()
        if isinstance(layer, multigraft.AdaptedLayer)
        for graft in layer.grafts.get(adapter, ())
        if graft.method.name == "LORA"
    }


def peft_sites(model: Any, adapter: str = "default") -> set[str]:
    """Base paths whose weight one of PEFT's adapters changes."""
    return {
        name
        for name, module in base_of(model).named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and adapter in module.scaling
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings, which are not under test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
