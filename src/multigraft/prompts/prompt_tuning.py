"""Prompt tuning: virtual tokens whose embeddings are the parameters.

    x' = [P; x]      P: (tokens, width)      x: (batch, tokens, width), the embedded input

Paper: Lester et al. 2021, arXiv:2104.08691, section 2.
Departs: encoder-decoders hold twice the rows, as PEFT's files do, and use the first half.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import PeftType, check_choice
from multigraft.errors import ConfigError, MissingExtraError
from multigraft.prompts.config import PromptLearningConfig, complete_token_sizes, words_of
from multigraft.prompts.contract import Table, context


class PromptTuningInit(str, Enum):
    """Where the first values come from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"
    __str__ = str.__str__


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's options, under PEFT's names.

    Args:
        prompt_tuning_init: ``"RANDOM"`` (standard normal), ``"SAMPLE_VOCAB"`` (embeddings of tokens
            drawn from the vocabulary) or ``"TEXT"`` (those of a text, repeated or cut).
        prompt_tuning_init_text: the text.
        tokenizer_name_or_path: what reads it.
        tokenizer_kwargs: options of the tokenizer; ``trust_remote_code`` is not among them.
    """

    peft_type: str | PeftType | None = PeftType.PROMPT_TUNING
    prompt_tuning_init: str | PromptTuningInit = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        choices = tuple(i.value for i in PromptTuningInit)
        check_choice(where, "prompt_tuning_init", self.prompt_tuning_init, choices)
        self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        is_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if is_text and not getattr(self, name):
                raise ConfigError(
                    f'{where}: prompt_tuning_init="TEXT" needs `{name}` '
                    f"(={getattr(self, name)!r}). Give both the text and its tokenizer."
                )
        if self.tokenizer_kwargs and not is_text:
            raise ConfigError(
                f"{where}: `tokenizer_kwargs` (={self.tokenizer_kwargs!r}) goes with "
                'prompt_tuning_init="TEXT" alone.'
            )


@context("PROMPT_TUNING", config=PromptTuningConfig, paper="arXiv:2104.08691")
class PromptTuning(Table):
    """One embedding per virtual token."""

    kind = "tokens"

    def __init__(self, config: PromptTuningConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.embedding = nn.Embedding(*self.shape(config))

    @classmethod
    def complete(cls, config: PromptTuningConfig, model: nn.Module) -> None:
        complete_token_sizes(config, model)

    @classmethod
    def shape(cls, config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    def initialise(self, model: nn.Module) -> None:
        words = words_of(model)
        self.begin_from(getattr(words, "base_layer", words))  # the base's own, whoever adapts it

    @torch.no_grad()
    def begin_from(self, words: Any) -> None:
        """Take the first values from the embeddings of words, as the config says."""
        device = next(words.parameters()).device
        rows = len(self.embedding.weight)
        if self.config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, words.num_embeddings, (rows,))
        elif self.config.prompt_tuning_init == PromptTuningInit.TEXT:
            ids = _text_ids(self.config)
            ids = ids.repeat(-(-rows // len(ids)))[:rows]
        else:
            return
        self.embedding.weight.copy_(words(ids.to(device)))


def _text_ids(config: PromptTuningConfig) -> Tensor:
    """The text's token ids ``(tokens,)``, at least one."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(
            'prompt_tuning_init="TEXT" reads the text with a tokenizer of transformers: '
            "pip install 'multigraft[train]'."
        ) from error
    # A checkpoint's config must not make its reader run code.
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(
            f"`prompt_tuning_init_text` (={config.prompt_tuning_init_text!r}) has no token in "
            f"`{config.tokenizer_name_or_path}`. Give a longer text."
        )
    return torch.tensor(ids, dtype=torch.long)
