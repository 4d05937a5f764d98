"""Runs as files: what may be asked for, read strictly, as a `Job`.

model: Qwen/Qwen3-0.6B
output: adapters
data: data/all.jsonl            # any key of an adapter here is the default of all
rank: 16
adapters:
  - {name: dates, data: data/dates.jsonl}
  - {name: names, data: data/names.jsonl, lr: 1e-4, epochs: 5}
"""

from multigraft.train.spec.job import job_of, targets_of
from multigraft.train.spec.keys import AdapterKeys, AdapterSpec, RunSpec
from multigraft.train.spec.read import read_run, run_of
from multigraft.train.spec.sweep import expanded

__all__ = [
    "AdapterKeys",
    "job_of",
    "AdapterSpec",
    "RunSpec",
    "expanded",
    "read_run",
    "run_of",
    "targets_of",
]
