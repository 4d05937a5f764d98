"""What hangs where in a model: its adapted sites, and the adapters side by side at each."""

from multigraft.inspection.checks import Violation
from multigraft.inspection.outline import Node, outline, render
from multigraft.inspection.structure import (
    AdaptedSite,
    SiteAdapter,
    SiteGroup,
    Structure,
    inspect,
)
from multigraft.inspection.verify import Report, verify

__all__ = [
    "AdaptedSite",
    "Node",
    "Report",
    "SiteAdapter",
    "SiteGroup",
    "Structure",
    "Violation",
    "inspect",
    "outline",
    "render",
    "verify",
]
