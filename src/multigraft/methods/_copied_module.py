"""What methods that train a copy of a whole module have in common.

    y = W' x + b'        W', b': copies of the base layer's tensors

The copy takes the base layer's place; with a LoRA of another adapter on the same layer, the LoRA
adds to it, so that each adapter still contributes its own change of the base and nothing else.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import nn

from multigraft.errors import TargetError
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.site import Site
from multigraft.storage import slot_of


class CopiedModule(Method):
    """A trained copy of the base module in its place; a subclass says how it is asked for."""

    kind: Literal["additive", "map", "replace"] = "replace"
    asked_by: str
    """The field of the config that names the modules."""
    on_disk: str = ""
    """What stands before a tensor's name in the file."""

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        self.follows_ties = getattr(config, "ensure_weight_tying", False)
        where = f"`{self.asked_by}`: {site.path} ({type(site.layer).__name__})"
        refusal = site.storage.copy_refusal(site.layer)
        if refusal is not None:
            raise TargetError(f"{where} {refusal}.")
        if not site.layer.state_dict():
            raise TargetError(f"{where} has no tensors to train. Leave it out.")

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec(tuple(t.shape), dtype=t.dtype, on_disk=f"{self.on_disk}{name}")
            for name, t in self.site.layer.state_dict().items()
        }

    def reset(self, params: Params) -> None:
        """The copy starts with the base's values: nothing to fill."""

    def module(self) -> nn.Module:
        twin = copy.deepcopy(self.site.layer)
        for name, kept in self.site.kept.items():
            slot_of(twin, name).give_back(kept)
        twin.requires_grad_(True)
        return twin
