"""Processes that stay: tests send them functions by name and get what each rank gives.

Importing torch and transformers takes seconds, so the processes of one size serve all files.
"""

from __future__ import annotations

import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

LIMIT = 120.0
"""Seconds that a job may take; whoever waits for a rank that failed gives up sooner.
Most of it is for starting on a busy machine."""


class RankFailed(Exception):
    """A rank raised; the text is its traceback."""


class World:
    """``size`` processes in one gloo group.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []

    def start(self) -> None:
        """Start the processes, unless they run."""
        if self.processes:
            return
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.asked = [context.Queue() for _ in range(self.size)]
        self.given = context.Queue()
        store = f"file://{Path(self.folder.name) / 'store'}"
        self.processes = [
            context.Process(
                target=_serve, args=(rank, self.size, store, self.asked[rank], self.given)
            )
            for rank in range(self.size)
        ]
        for process in self.processes:
            process.daemon = True
            process.start()

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``job(*args)`` gives on each rank.

        Raises:
            RankFailed: it raised on one of them.
        """
        self.start()
        for asked in self.asked:
            asked.put((job, args))
        found: dict[int, Any] = {}
        failed = []
        while len(found) < self.size:
            try:
                rank, is_good, value = self.given.get(timeout=LIMIT)
            except queue.Empty:
                self.close()
                raise RankFailed(f"only ranks {sorted(found)} answered") from None
            found[rank] = value
            if not is_good:
                failed.append(f"rank {rank}:\n{value}")
        if failed:
            self.close()  # a group that failed once is of no use to later tests
            raise RankFailed("\n".join(failed))
        return [found[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes; the next job starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _serve(rank: int, size: int, store: str, asked: Any, given: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while (task := asked.get()) is not None:
        job, args = task
        try:
            given.put((rank, True, job(*args)))
        except BaseException:
            given.put((rank, False, traceback.format_exc()))
    torch.distributed.destroy_process_group()
