"""What a `PeftModel` does for context adapters, and what PEFT's users ask it about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multigraft.errors import StateError, UnsupportedError
from multigraft.prompts.cache import filled_cache
from multigraft.prompts.config import words_of
from multigraft.prompts.contract import TABLE, Context
from multigraft.prompts.forward import with_context
from multigraft.prompts.generation import for_generation

if TYPE_CHECKING:
    from multigraft.roster import Roster

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class PromptFacade:
    """Mixed into the model's handle."""

    if TYPE_CHECKING:

        @property
        def roster(self) -> Roster:
            """Which adapters there are and who is active."""

        def get_base_model(self) -> nn.Module:
            """The base model."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled handle is one of its own roster's."""
        super().__setstate__(state)  # type: ignore[misc]
        self.roster.show_contexts(self)  # type: ignore[arg-type]

    @property
    def word_embeddings(self) -> nn.Module:
        """The module that embeds the base model's own tokens."""
        return words_of(self.get_base_model())

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """What the active context adapter gives for a batch.

        Args:
            task_ids: of multitask prompt tuning, which is not built: None.
            max_cache_len: has no effect: the cache grows with what is put in.

        Returns:
            Virtual tokens ``(batch_size, rows, width)``, or a cache that holds the prefix.

        Raises:
            StateError: no context adapter is active.
            UnsupportedError: `task_ids` are given.
        """
        if task_ids is not None:
            raise UnsupportedError(
                "`task_ids` are of multitask prompt tuning, which is not built. Leave them out, or "
                "use an adapter for each task."
            )
        context, model = self._context(), self.get_base_model()
        if context.kind == "cache":
            return filled_cache(context, model, batch_size)
        table = context()
        return table.expand(batch_size, *table.shape)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The table that a context adapter's file holds, on the CPU."""
        (name,) = self.roster.require(adapter_name)
        context = self.roster.context_of(name)
        if context is None:
            raise StateError(f"adapter `{name}` changes weights and has no prompt.")
        return context.saved()[TABLE].detach().cpu()

    def _context(self) -> Context:
        context = self.roster.acting_context()
        if context is None:
            active = ", ".join(f"`{name}`" for name in self.roster.acting()) or "none"
            raise StateError(f"no adapter with a prompt is active (active: {active}).")
        return context

    def _in_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a forward, with the active context in them."""
        context = self.roster.acting_context()
        if context is None:
            return args, kwargs
        return (), with_context(context, self.get_base_model(), args, kwargs)

    @torch.no_grad()
    def _generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of ``generate``, with the active context in them."""
        context = self.roster.acting_context()
        if context is None:
            return args, kwargs
        return (), for_generation(context, self.get_base_model(), args, kwargs)
