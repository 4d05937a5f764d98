"""What a training step takes, counted before there is any weight.

    found = plan("Qwen/Qwen3-0.6B", LoraConfig(r=16, target_modules="all-linear"), memory="24GiB")
    found.parts, found.total, found.largest_batch
    print(text(found, remedies(found)))

The step runs on tensors without memory, so that the plan knows no architecture. See `docs/plan.md`.
"""

from multigraft.planning.cluster import (
    ClusterPlan,
    as_rows,
    cluster_table,
    clusters,
    notes,
    spread_over,
)
from multigraft.planning.memory import MemoryPlan, plan, planned
from multigraft.planning.remedies import Remedy, advice, out_of_memory, remedies
from multigraft.planning.request import Request
from multigraft.planning.run import request_of
from multigraft.planning.sizes import as_text, bytes_of
from multigraft.planning.step import PARTS, Step, run_step
from multigraft.planning.table import as_data, text

__all__ = [
    "PARTS",
    "ClusterPlan",
    "MemoryPlan",
    "Remedy",
    "Request",
    "Step",
    "advice",
    "as_data",
    "as_rows",
    "as_text",
    "bytes_of",
    "cluster_table",
    "clusters",
    "notes",
    "out_of_memory",
    "plan",
    "planned",
    "remedies",
    "request_of",
    "run_step",
    "spread_over",
    "text",
]
