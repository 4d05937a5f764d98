"""The model card of an adapter that a run has trained: on what, how, and what was measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multigraft.atomic import write_files, write_utf8
from multigraft.card import CARD_NAME, Facts, new_card
from multigraft.config import PeftConfig

if TYPE_CHECKING:
    from multigraft.train.entrant import Entrant
    from multigraft.train.job import AdapterJob


MARK = "<!-- A run writes this card anew. Remove this line to keep your own words. -->"


def write_card(folder: Path, config: PeftConfig, job: AdapterJob, entrant: Entrant) -> None:
    """Write it into the adapter's folder, unless a card of somebody's own lies there."""
    path = folder / CARD_NAME
    there = path.read_text("utf-8") if path.is_file() else ""
    if there and MARK not in there and there != new_card(config):
        return
    text = f"{new_card(config, facts_of(job, entrant))}{MARK}\n"
    write_files({path: partial(write_utf8, text=text)})


def facts_of(job: AdapterJob, entrant: Entrant) -> Facts:
    """What the adapter's files do not tell."""
    recipe = job.recipe
    training: dict[str, Any] = {
        "data": f"`{_named(job.data)}`",
        "steps": f"{entrant.kept_step} of {entrant.lane.steps}",
        "examples in a step": recipe.batch_size * recipe.accumulate,
        "learning rate": f"{recipe.lr:g}, {recipe.schedule}",
        "optimiser": recipe.optimizer,
        "seed": recipe.seed,
    }
    kept = [e.values for e in entrant.evaluations if e.step == entrant.kept_step]
    held_out = f"{job.eval_split:.0%} of {_named(job.data)}" if job.eval_split else None
    return Facts(
        datasets=[] if Path(job.data).exists() else [_named(job.data)],
        metrics=kept[-1] if kept else {},
        evaluated_on=_named(job.eval_data) if job.eval_data else held_out,
        training=training,
    )


def _named(source: str) -> str:
    """A data set's name on the hub, or a file's without the folders of this machine."""
    return Path(source).name if Path(source).exists() else source.partition("@")[0]
