"""What hangs where in a model: its adapted sites, and the adapters side by side at each."""

from multigraft.inspection.outline import Node, outline, render
from multigraft.inspection.structure import (
    AdaptedSite,
    SiteAdapter,
    SiteGroup,
    Structure,
    inspect,
)

__all__ = [
    "AdaptedSite",
    "Node",
    "SiteAdapter",
    "SiteGroup",
    "Structure",
    "inspect",
    "outline",
    "render",
]
