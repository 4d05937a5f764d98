"""What other packages are told of adapted models. Nothing here imports them.

`transformers` lets their `Trainer` know our models; `in_place` gives a transformers model that was
adapted in place the methods through which it is saved and loaded.
"""

from __future__ import annotations

from multigraft.integrations import in_place, transformers
from multigraft.roster import Roster


def announce(roster: Roster) -> None:
    """Show on the base model that it has adapters; nothing of that is left with the last one."""
    seen = roster.root.__dict__
    if not roster.configs:
        seen.pop("peft_config", None)
        in_place.withdraw(roster.root)
        return
    seen["peft_config"] = roster.configs
    in_place.offer(roster)
    transformers.on_adapted()
