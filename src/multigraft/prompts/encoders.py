"""The modules that hold prompts, under PEFT's names: what a handle's adapters are, or made by hand.

A handle makes them from a config and the model. By hand there is no model to ask, so the config
must give every size; what is made so is a module like any other, and no adapter of anything.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from multigraft.config import require
from multigraft.prompts.contract import Table
from multigraft.prompts.p_tuning import PromptEncoderConfig, PTuning
from multigraft.prompts.prefix_tuning import PrefixTuning, PrefixTuningConfig
from multigraft.prompts.prompt_tuning import PromptTuning, PromptTuningConfig


class AskedOfContext(type):
    """The type of a class whose instances are the contexts of one method, too."""

    context: type[Table]

    def __instancecheck__(cls, instance: object) -> bool:
        return type.__instancecheck__(cls, instance) or type(instance) is cls.context


class PrefixEncoder(PrefixTuning, metaclass=AskedOfContext):
    """The keys and values of a prefix.

    Args:
        config: with `token_dim`, `num_layers` and `num_attention_heads`.

    Raises:
        ConfigError: a size is not given.
    """

    context: ClassVar[type[Table]] = PrefixTuning

    def __init__(self, config: PrefixTuningConfig) -> None:
        sizes = "token_dim", "num_layers", "num_attention_heads"
        projection = ("encoder_hidden_size",) if config.prefix_projection else ()
        _require_sizes(config, *sizes, *projection)
        super().__init__(config, nn.Module())
        self.prefix_projection = config.prefix_projection
        self.initialise(self)


class PromptEncoder(PTuning, metaclass=AskedOfContext):
    """The virtual tokens of p-tuning, and the network that makes them.

    Args:
        config: with `token_dim`, `num_transformer_submodules` and `encoder_hidden_size`.

    Raises:
        ConfigError: a size is not given.
    """

    context: ClassVar[type[Table]] = PTuning

    def __init__(self, config: PromptEncoderConfig) -> None:
        hidden = () if config.inference_mode else ("encoder_hidden_size",)
        _require_sizes(config, "token_dim", "num_transformer_submodules", *hidden)
        super().__init__(config, nn.Module())
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = len(self.embedding.weight)
        self.encoder_type = config.encoder_reparameterization_type


class PromptEmbedding(PromptTuning, metaclass=AskedOfContext):
    """The virtual tokens of prompt tuning.

    Args:
        config: with `token_dim` and `num_transformer_submodules`.
        word_embeddings: the module whose embeddings they begin with, if the config says so.

    Raises:
        ConfigError: a size is not given.
    """

    context: ClassVar[type[Table]] = PromptTuning

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        _require_sizes(config, "token_dim", "num_transformer_submodules")
        super().__init__(config, nn.Module())
        if not config.inference_mode:
            self.begin_from(word_embeddings)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """What a decoder reads to predict these tokens ``(batch, tokens)``: each one's predecessor.

    Args:
        pad_token_id: stands where a label is -100.
        decoder_start_token_id: stands first.
    """
    require(pad_token_id is not None, "shift_tokens_right", "pad_token_id", None, "a token's id")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def _require_sizes(config: Any, *names: str) -> None:
    for name in names:
        size = getattr(config, name)
        needed = "a size, as there is no model to ask"
        require(size is not None, type(config).__name__, name, size, needed)
