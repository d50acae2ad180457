"""Processes that run jobs together, one per rank and GPU, each job within a time limit.

The pool, and the jobs that build a model under any layout, are those of the tests.
"""

import faulthandler
import importlib
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cudnn_first  # noqa: F401

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from helpers import layouts
from helpers.dispatchers import clear_dispatchers
from helpers.pool import WorkerFailed, WorkerPool

__all__ = ["OutOfTime", "Ranks", "WorkerFailed", "clear_dispatchers", "layouts", "start"]


class OutOfTime(WorkerFailed):
    """Nothing is left of ``begin``'s time; the processes are as they were."""


STARTING = 120.0  # seconds until processes have imported what they need
_MOST = 0.9  # of a job's time, after which it says where it is


def start(rank: int, world_size: int) -> None:
    """A job that imports what the others need, so that their limits need not allow for it."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    importlib.import_module("mhc_megatron.training.trainer")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def shown(rank: int, world_size: int, seconds: float, job: Callable[..., Any], *rest: Any) -> Any:
    """A job that runs another, and says on stderr where that is when it still is after a time."""
    faulthandler.dump_traceback_later(seconds)
    try:
        return job(rank, world_size, *rest)
    finally:
        faulthandler.cancel_dump_traceback_later()


class Ranks:
    """``run(job, n, *arguments)`` calls ``job(rank, n, *arguments)`` on ranks 0 .. n - 1 at once.

    Args:
        num_ranks: processes; they are replaced after a job that failed.
        patience: multiplies every limit, for a busy machine.
    """

    def __init__(self, num_ranks: int, *, patience: float = 1.0) -> None:
        self.num_ranks, self._patience = num_ranks, patience
        self._pool: WorkerPool | None = None
        self._allowed = 0.0
        self._deadline: float | None = None

    def begin(self, seconds: float) -> None:
        """Jobs have to end within ``seconds`` from the first; starts of processes do not count."""
        self._allowed, self._deadline = seconds * self._patience, None

    def run(
        self, job: Callable[..., Any], num_ranks: int, *arguments: Any, seconds: float
    ) -> list[Any]:
        """What the job returned on each rank.

        Args:
            job: a function of a module, which the processes import.
            num_ranks: that take part.
            arguments: of the job after rank and number of ranks.
            seconds: limit of this job; what is left of ``begin``'s counts as well.

        Raises:
            OutOfTime: ``begin``'s time is over.
            WorkerFailed: it failed on some rank, or took too long; the processes are gone.
        """
        return self._run(self._start(), seconds, job, num_ranks, *arguments)

    def _start(self) -> WorkerPool:
        if self._pool is None or not all(p.is_alive() for p in self._pool.processes):
            self.close()
            began, pool = time.monotonic(), WorkerPool(self.num_ranks)
            self._pool, pool.timeout = pool, STARTING * self._patience
            pool.run(start, self.num_ranks)
            if self._deadline is not None:
                self._deadline += time.monotonic() - began
        return self._pool

    def _run(
        self,
        pool: WorkerPool,
        seconds: float,
        job: Callable[..., Any],
        num_ranks: int,
        *arguments: Any,
    ) -> list[Any]:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._allowed
        left = min(seconds * self._patience, self._deadline - time.monotonic())
        if left <= 0:
            raise OutOfTime("no time is left for it")
        pool.timeout = left
        return pool.run(shown, num_ranks, _MOST * left, job, *arguments)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
