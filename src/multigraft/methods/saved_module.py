"""``modules_to_save``: the adapter trains its own copy of a whole module.

A method of PEFT's configs rather than of a paper, and an addition to any other method: its tensors
stand in the file under the base's own names.
"""

from __future__ import annotations

from multigraft.methods._copied_module import CopiedModule
from multigraft.methods.contract import method


@method("SAVED_MODULE", config=None, paper="PEFT's `modules_to_save`")
class SavedModule(CopiedModule):
    """A trained copy of a module that the config saves beside its main method."""

    prefix = "modules_to_save"
    asked_by = "modules_to_save"
