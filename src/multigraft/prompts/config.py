"""The options that context methods of the prompt kind share, and the sizes that a model tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from multigraft.config import PeftConfig, TaskType, require
from multigraft.errors import ConfigError, UnsupportedError


@dataclass
class PromptLearningConfig(PeftConfig):
    """What every method that learns a prompt has.

    Args:
        num_virtual_tokens: how many tokens are put before the user's.
        token_dim: width of one; the model's own by default.
        num_transformer_submodules: 2 for encoder-decoders, as their files have it, else 1.
        num_attention_heads: of the model; asked for keys and values only.
        num_layers: of the model; asked for keys and values only.
        modules_to_save: modules that this adapter trains whole copies of.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        sizes = {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": self.token_dim,
            "num_transformer_submodules": self.num_transformer_submodules,
            "num_attention_heads": self.num_attention_heads,
            "num_layers": self.num_layers,
        }
        for name, size in sizes.items():
            if size is not None or name == "num_virtual_tokens":
                require_count(where, name, size)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]

    @property
    def is_prompt_learning(self) -> bool:
        return True


def require_count(where: str, name: str, value: Any) -> None:
    """Raise `ConfigError` unless ``value`` is an integer of at least 1."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(is_count, where, name, value, "an integer of at least 1")


def complete_sizes(config: PromptLearningConfig, model: nn.Module, needed: Sequence[str]) -> None:
    """Fill the sizes that the user left out from the model's own config.

    Args:
        needed: those that the method cannot do without; the others stand in its files.

    Raises:
        ConfigError: the model's config does not tell one that is needed.
    """
    for field, names in _NAMES.items():
        if getattr(config, field) is not None:
            continue
        value = tell(model, *names)
        if value is None and field in needed:
            known = ", ".join(f"`{name}`" for name in names)
            raise ConfigError(
                f"`{field}` (=None) is taken from the model's config, which has none of {known}. "
                "Give it in the adapter's config."
            )
        setattr(config, field, value if value is None else int(value))
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1


def complete_token_sizes(config: PromptLearningConfig, model: nn.Module) -> None:
    """As `complete_sizes`; virtual tokens are as wide as what the model's embedding gives.

    Raises:
        ConfigError: also when they are not.
    """
    width = getattr(words_of(model), "embedding_dim", None)
    config.token_dim = config.token_dim or width
    complete_sizes(config, model, needed=("token_dim",))
    if width is not None and config.token_dim != width:
        raise ConfigError(
            f"`token_dim` (={config.token_dim}) must be {width}, the width of the embeddings of "
            f"{type(model).__name__}. Leave it at None."
        )


def tell(model: nn.Module, *names: str) -> Any:
    """The first of these that the model's config (of its text part) has, or None."""
    own = getattr(model, "config", None)
    text = getattr(own, "get_text_config", None)
    own = text() if callable(text) else own
    for name in names:
        value = own.get(name) if isinstance(own, Mapping) else getattr(own, name, None)
        if value is not None:
            return value
    return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(tell(model, "is_encoder_decoder"))


def words_of(model: nn.Module) -> nn.Module:
    """The module that looks up the model's own tokens, with the adapters that act on it.

    Raises:
        UnsupportedError: the model does not tell it.
    """
    get = getattr(model, "get_input_embeddings", None)
    found = get() if callable(get) else None
    if not isinstance(found, nn.Module):
        raise UnsupportedError(
            f"{type(model).__name__} has no get_input_embeddings() that gives its token embedding, "
            "and virtual tokens stand beside what that gives. Define it on the model."
        )
    return found


_NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "num_heads",
        "encoder_attention_heads",
    ),
}
"""What models call the sizes that a config takes from them."""
