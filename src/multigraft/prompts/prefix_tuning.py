"""Prefix tuning: keys and values of tokens that were never there, at every layer.

    attention(q, [Pk; k], [Pv; v])      Pk, Pv: (tokens, heads * size) at each layer
    P = E, or P = W2 tanh(W1 E + b1) + b2 with `prefix_projection`

Paper: Li and Liang 2021, arXiv:2101.00190, section 4.
Departs: encoder-decoders have a prefix in the decoder's self-attention alone, as in PEFT.
A file holds P; the network is there in training alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import PeftType, check_choice, require
from multigraft.prompts.cache import check_takes_cache, key_shape, layers_with_prefix
from multigraft.prompts.config import (
    PromptLearningConfig,
    complete_sizes,
    is_encoder_decoder,
    require_count,
    tell,
)
from multigraft.prompts.contract import Table, context


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's options, under PEFT's names.

    Args:
        init_weights: ``"zero"`` starts with keys and values of zero; at random by default.
        encoder_hidden_size: width inside the network; `token_dim` by default.
        prefix_projection: make the prefix by a network of two layers.
    """

    peft_type: str | PeftType | None = PeftType.PREFIX_TUNING
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        if self.init_weights is not None:
            check_choice(where, "init_weights", self.init_weights, ("zero",))
        if self.encoder_hidden_size is not None:
            require_count(where, "encoder_hidden_size", self.encoder_hidden_size)


@context("PREFIX_TUNING", config=PrefixTuningConfig, paper="arXiv:2101.00190")
class PrefixTuning(Table):
    """One row of keys and values of all layers per virtual token."""

    kind = "cache"

    def __init__(self, config: PrefixTuningConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.layers = layers_with_prefix(config, model)
        rows, width = self.shape(config)
        if not config.prefix_projection or config.inference_mode:
            self.embedding = nn.Embedding(rows, width)
            return
        in_, hidden = config.token_dim, config.encoder_hidden_size
        assert in_ is not None and hidden is not None, "`complete` fills them"
        self.embedding = nn.Embedding(rows, in_)
        self.transform = nn.Sequential(nn.Linear(in_, hidden), nn.Tanh(), nn.Linear(hidden, width))

    @classmethod
    def complete(cls, config: PrefixTuningConfig, model: nn.Module) -> None:
        check_takes_cache(cls.name, model)
        shape = key_shape(cls.name, model)
        if shape is not None:  # whatever the config says: it is the model's to say
            config.num_attention_heads, config.token_dim = shape[0], shape[0] * shape[1]
        if is_encoder_decoder(model) and config.num_layers is None:
            config.num_layers = tell(model, "num_decoder_layers", "decoder_layers")
        complete_sizes(config, model, ("num_layers", "token_dim", "num_attention_heads"))
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    @classmethod
    def shape(cls, config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens, config.num_layers * 2 * config.token_dim

    def made(self, rows: Tensor) -> Tensor:
        made: Tensor = self.transform(rows)
        return made

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Make the prefix this table ``(rows, layers * 2 * width)``.

        Raises:
            ConfigError: a network makes the prefix, or the table is of another shape.
        """
        require(
            not self.config.prefix_projection,
            "PREFIX_TUNING",
            "prefix_projection",
            True,
            "False for a prefix that is given: a network's own cannot be told from it",
        )
        own, given = tuple(self.embedding.weight.shape), tuple(prompt_embeddings.shape)
        require(own == given, "PREFIX_TUNING", "prompt_embeddings.shape", given, f"{own}")
        self.embedding.weight.copy_(prompt_embeddings)

    @property
    def is_flat(self) -> bool:
        return "transform" not in self._modules

    def initialise(self, model: nn.Module) -> None:
        if self.config.init_weights != "zero":
            return
        last = self.embedding if self.is_flat else self.transform[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
