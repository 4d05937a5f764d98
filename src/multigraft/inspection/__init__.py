"""What hangs where in a model: its adapted sites, and the adapters side by side at each."""

from multigraft.inspection.checks import Violation
from multigraft.inspection.outline import Node, outline, render
from multigraft.inspection.request import config_for
from multigraft.inspection.structure import (
    AdaptedSite,
    SiteAdapter,
    SiteGroup,
    Structure,
    inspect,
)
from multigraft.inspection.targets import Target, TargetGroup, TargetPart, TargetPlan, targets
from multigraft.inspection.verify import Report, verify

__all__ = [
    "AdaptedSite",
    "Node",
    "Report",
    "SiteAdapter",
    "SiteGroup",
    "Structure",
    "Target",
    "TargetGroup",
    "TargetPart",
    "TargetPlan",
    "Violation",
    "config_for",
    "inspect",
    "outline",
    "render",
    "targets",
    "verify",
]
