"""What PEFT's users ask of a `PeftModel` besides its adapters' lives, and the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from multigraft.card import Facts, tags_of, update_card
from multigraft.config import PeftConfig
from multigraft.errors import StateError
from multigraft.gradients import let_gradients_in
from multigraft.hub import Pushable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Concatenate, ParamSpec, TypeVar

    from multigraft.roster import Roster
    from multigraft.tuner import Tuner

    P = ParamSpec("P")
    T = TypeVar("T")

    def of_tuner(verb: Callable[Concatenate[Tuner, P], T]) -> Callable[Concatenate[Any, P], T]:
        """A verb of the tuner's, as type checkers see it on the handle, which passes it on."""
        raise NotImplementedError


class HandleFacade(Pushable):
    """Mixed into the model's handle."""

    if TYPE_CHECKING:
        base_model: Any
        save_pretrained: Any

        add_weighted_adapter = of_tuner(Tuner.add_weighted_adapter)
        merge_adapter = of_tuner(Tuner.merge_adapter)
        set_requires_grad = of_tuner(Tuner.set_requires_grad)
        unmerge_adapter = of_tuner(Tuner.unmerge_adapter)

        @property
        def roster(self) -> Roster:
            """Which adapters there are and who is active."""

        def get_base_model(self) -> nn.Module:
            """The base model."""

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base model's dtype, or None where it does not tell it."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts on what the model gives: one is active, and none is disabled."""
        return bool(self.roster.acting())

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter trains a copy of, or None for none."""
        saved = (getattr(c, "modules_to_save", None) or () for c in self.roster.configs.values())
        return {name for names in saved for name in names} or None

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients into a model whose inputs have none; done anyway when one is adapted."""
        let_gradients_in(model)
        return model

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str], **facts: Any) -> None:
        """Let the directory's ``README.md`` say which adapter lies there; its text stays.

        Args:
            facts: what the adapter does not tell: those of `multigraft.card.Facts`.
        """
        tags = [*tags_of(self.get_base_model()), *facts.pop("tags", ())]
        update_card(output_dir, self._config_of_card(), Facts(**facts, tags=tags))

    def _config_of_card(self) -> PeftConfig:
        names = [*self.roster.active, *self.roster.configs]
        if not names:
            raise StateError("the model has no adapter, so there is nothing to write a card of.")
        return self.roster.configs[names[0]]

    def _fill(self, folder: Path, tags: list[str], saving: Mapping[str, Any]) -> None:
        self.save_pretrained(folder, **saving)
        self.create_or_update_model_card(folder, tags=tags)
