"""A report on adapters, as data and as one HTML page that needs nothing else.

write_report(["my-adapters/dates", "my-adapters/records"], "report.html", base=model)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from multigraft.atomic import write_text
from multigraft.report.collect import AdapterFigures, Report, collect
from multigraft.report.curves import Curve, read_curves
from multigraft.report.figures import SiteFigures
from multigraft.report.intruders import LARGEST, count_intruders
from multigraft.report.page import page
from multigraft.report.similarity import Similarity, similarity

__all__ = [
    "AdapterFigures",
    "Curve",
    "Report",
    "Similarity",
    "SiteFigures",
    "collect",
    "count_intruders",
    "page",
    "read_curves",
    "similarity",
    "write_report",
]


def write_report(
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    intruder_limit: int = LARGEST,
    allow_pickle: bool = False,
) -> Report:
    """Write the report on adapters as one page; see `collect` for the arguments.

    Raises:
        CheckpointError, ConfigError, TargetError: as for `collect`; nothing was written.
    """
    report = collect(adapters, base=base, intruder_limit=intruder_limit, allow_pickle=allow_pickle)
    write_text(Path(output), page(report))
    return report
