"""``modules_to_save``: the adapter trains its own copy of a whole module.

    y = W' x + b'        W', b': copies of the base layer's tensors

A method of PEFT's configs rather than of a paper. It stands beside the others at a site: with a
LoRA of another adapter on the same layer, the copy takes the base layer's place and the LoRA adds
to it, so that each adapter still contributes its own change of the base and nothing else.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from multigraft.errors import TargetError
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site
from multigraft.storage import slot_of


@method("SAVED_MODULE", config=None, paper="PEFT's `modules_to_save`")
class SavedModule(Method):
    """A trained copy of the base module in its place."""

    prefix = "modules_to_save"
    kind = "replace"
    batchable = True

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        refusal = site.storage.copy_refusal(site.layer)
        if refusal is not None:
            raise TargetError(
                f"`modules_to_save`: {site.path} ({type(site.layer).__name__}) {refusal}."
            )

    def tensors(self) -> dict[str, TensorSpec]:
        state = self.site.layer.state_dict()
        return {name: TensorSpec(tuple(t.shape), dtype=t.dtype) for name, t in state.items()}

    def reset(self, params: Params) -> None:
        """The copy starts with the base's values: nothing to fill."""

    def module(self) -> nn.Module:
        twin = copy.deepcopy(self.site.layer)
        for name, kept in self.site.kept.items():
            slot_of(twin, name).give_back(kept)
        twin.requires_grad_(True)
        return twin
