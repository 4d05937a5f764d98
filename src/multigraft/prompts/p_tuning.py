"""P-tuning: virtual tokens that a small network makes.

    x' = [f(E); x]      E: (tokens, width), learned      f: MLP, or LSTM and MLP, learned
    f(E) = W3 relu(W2 relu(W1 E + b1) + b2) + b3         W1: (hidden, width)   W3: (width, hidden)

Paper: Liu et al. 2021, arXiv:2103.10385, section 3. The LSTM is the paper's, the MLP PEFT's.
A file holds f(E); the network is there in training alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from multigraft.config import PeftType, check_choice, require_probability
from multigraft.errors import MultigraftWarning
from multigraft.prompts.config import (
    PromptLearningConfig,
    complete_token_sizes,
    require_count,
)
from multigraft.prompts.contract import Table, context

MLP_LAYERS = 2
"""Hidden layers of the MLP, whatever `encoder_num_layers` says."""


class PromptEncoderReparameterizationType(str, Enum):
    """Which network makes the tokens."""

    MLP = "MLP"
    LSTM = "LSTM"
    __str__ = str.__str__


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning's options, under PEFT's names.

    Args:
        encoder_reparameterization_type: ``"MLP"`` or ``"LSTM"``.
        encoder_hidden_size: width inside the network; `token_dim` by default.
        encoder_num_layers: of the LSTM; the MLP always has two hidden ones.
        encoder_dropout: between the layers of the LSTM.
    """

    peft_type: str | PeftType | None = PeftType.P_TUNING
    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = MLP_LAYERS
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        kind, choices = self.encoder_reparameterization_type, PromptEncoderReparameterizationType
        check_choice(
            where, "encoder_reparameterization_type", kind, tuple(c.value for c in choices)
        )
        self.encoder_reparameterization_type = choices(kind)
        require_count(where, "encoder_num_layers", self.encoder_num_layers)
        if self.encoder_hidden_size is not None:
            require_count(where, "encoder_hidden_size", self.encoder_hidden_size)
        require_probability(where, "encoder_dropout", self.encoder_dropout)
        if kind == choices.MLP and self.encoder_num_layers != MLP_LAYERS:
            warnings.warn(
                f"{where}: `encoder_num_layers` (={self.encoder_num_layers}) has no effect with "
                f"the MLP, which has {MLP_LAYERS} hidden layers.",
                MultigraftWarning,
                stacklevel=3,
            )


@context("P_TUNING", config=PromptEncoderConfig, paper="arXiv:2103.10385")
class PTuning(Table):
    """An embedding per virtual token, and the network behind it."""

    kind = "tokens"

    def __init__(self, config: PromptEncoderConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        rows, width = self.shape(config)
        self.embedding = nn.Embedding(rows, width)
        if config.inference_mode:
            return
        hidden = config.encoder_hidden_size or width
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        layers: list[nn.Module] = []
        for in_, out in pairwise(sizes):
            layers += [nn.Linear(in_, out), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    @classmethod
    def complete(cls, config: PromptEncoderConfig, model: nn.Module) -> None:
        complete_token_sizes(config, model)
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    @classmethod
    def shape(cls, config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    @property
    def is_flat(self) -> bool:
        return "mlp_head" not in self._modules

    def made(self, rows: Tensor) -> Tensor:
        if "lstm_head" in self._modules:
            rows = self.lstm_head(rows)[0]
        made: Tensor = self.mlp_head(rows)
        return made
