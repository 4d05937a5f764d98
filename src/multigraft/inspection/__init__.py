"""What hangs where in a model: its adapted sites, and the adapters side by side at each."""

from multigraft.inspection.assemble import assemble
from multigraft.inspection.checks import Violation
from multigraft.inspection.diff import (
    ChangeDifference,
    Difference,
    FieldDifference,
    TensorDifference,
    diff,
)
from multigraft.inspection.files import AdapterFiles, read_adapter, read_adapters
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
    "AdapterFiles",
    "ChangeDifference",
    "Difference",
    "FieldDifference",
    "Node",
    "Report",
    "SiteAdapter",
    "SiteGroup",
    "Structure",
    "Target",
    "TargetGroup",
    "TargetPart",
    "TargetPlan",
    "TensorDifference",
    "Violation",
    "assemble",
    "config_for",
    "diff",
    "inspect",
    "outline",
    "read_adapter",
    "read_adapters",
    "render",
    "targets",
    "verify",
]
