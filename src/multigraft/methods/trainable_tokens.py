"""Trainable tokens: some rows of an embedding are trained, and nothing else.

    W'[i] = T[k]  where i is the k-th trained token;  W'[i] = W[i] elsewhere       T: (tokens, dim)

An output head that shares the embedding's weight uses the same rows. Asked for by a config of its
own, or by another method's ``trainable_token_indices``, beside which it then stands.

A method of PEFT's rather than of a paper.
Departs: several adapters may train the same token; their changes of it add up, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multigraft.config import PeftType, TargetedConfig, check_tokens
from multigraft.errors import TargetError
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site

ROWS = "trainable_tokens_delta"


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Which tokens are trained, under PEFT's names.

    Args:
        token_indices: the tokens, by their ids.
        init_weights: start at the embedding's own rows; False starts at random.

    `target_modules` None means the model's input embedding.
    """

    peft_type: str | PeftType | None = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    _ours_only: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        self.token_indices = check_tokens(where, "token_indices", self.token_indices)


class TokenRows(Method):
    """Trained rows in place of some of the weight's own; a subclass says which."""

    prefix = "trainable_tokens_"
    needs_weight = True
    follows_ties = True
    geometries = frozenset({"linear", "embedding"})

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        self.tokens = self.chosen()
        rows, self.width = self.geometry.row_sizes(site.layer)
        beyond = [token for token in self.tokens if token >= rows]
        if beyond or not self.tokens:
            what = f"tokens {beyond[:5]} are not among its rows" if beyond else "no token is named"
            raise TargetError(
                f"{site.path}: {what}; it has {rows} rows, so give indices from 0 to {rows - 1}, "
                "after the embedding is resized."
            )
        self._index = torch.tensor(self.tokens)

    def chosen(self) -> list[int]:
        """The rows that are trained at this site."""
        raise NotImplementedError(f"{type(self).__name__} must define `chosen`")

    def tensors(self) -> dict[str, TensorSpec]:
        return {ROWS: TensorSpec((len(self.tokens), self.width))}

    def reset(self, params: Params) -> None:
        rows = params[ROWS]
        if getattr(self.config, "init_weights", True):
            W = self.site.weight()
            rows.copy_(W[self.index(W.device)])
        else:
            nn.init.normal_(rows)

    def index(self, device: torch.device) -> Tensor:
        """The trained rows' indices, ``(tokens,)``."""
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index

    def add(
        self, params: Params, y: Tensor, x: Tensor, training: bool, base: Tensor | None = None
    ) -> Tensor:
        W = self.site.weight()
        index, own = self.index(x.device), W[self.index(W.device)]
        return self.geometry.exchange_rows(self.site.layer, y, x, index, own, params[ROWS])

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        assert W is not None
        return self.add_delta(params, torch.zeros_like(W), W)

    def add_delta(self, params: Params, value: Tensor, W: Tensor | None = None) -> Tensor:
        assert W is not None
        index, rows = self.index(value.device), params[ROWS].to(value.device, value.dtype)
        # In this order the trained rows come out exactly where nobody else changed them.
        others = value[index] - W[self.index(W.device)].to(value.device, value.dtype)
        return value.index_copy(0, index, others + rows)


@method("TRAINABLE_TOKENS", config=TrainableTokensConfig, paper="PEFT's trainable tokens")
class TrainableTokens(TokenRows):
    """The rows that the adapter's own config names."""

    @classmethod
    def complete(cls, config: TrainableTokensConfig, model: nn.Module) -> None:
        if config.target_modules is None:
            found = getattr(model, "get_input_embeddings", lambda: None)()
            names = (name for name, module in model.named_modules() if module is found)
            config.target_modules = next(names, "embed_tokens")

    def chosen(self) -> list[int]:
        tokens: list[int] = self.config.token_indices
        return tokens


@method("TOKEN_ADAPTER", config=None, paper="PEFT's `trainable_token_indices`")
class TokenAdapter(TokenRows):
    """The rows that another method's config names in ``trainable_token_indices``."""

    def chosen(self) -> list[int]:
        wanted: list[int] | Mapping[str, list[int]] = self.config.trainable_token_indices
        if not isinstance(wanted, Mapping):
            return wanted
        path = f".{(self.site.tied or self.site).path}"
        return next((t for name, t in wanted.items() if path.endswith(f".{name}")), [])

    def tensors(self) -> dict[str, TensorSpec]:
        (rows,) = super().tensors().values()
        # PEFT keeps what it calls a token adapter inside the wrapped layer.
        on_disk = f"token_adapter.{ROWS}"
        return {ROWS: rows._replace(on_disk=on_disk, saved=self.site.tied is None)}
