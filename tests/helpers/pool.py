"""Worker processes that stay alive between tests; torch and Megatron are imported once for all."""

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch

from mhc_megatron.launch.port import reserved_port

# What nearly every job needs; none of it starts a thread, so that a process can be forked with it.
_IMPORTED_ONCE = ["torch", "mhc_megatron.training.loop", "mhc_megatron.report.tensorboard"]
# Process groups that outlive their test keep threads that poll: after so many, begin anew.
_MOST_JOBS = 12


def process_context(imported: list[str] = _IMPORTED_ONCE) -> Any:
    """Of new processes: forked from one that has imported the heavy modules and done nothing.

    With a GPU each starts afresh: Megatron's imports set CUDA up, which does not survive a fork.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(imported)
    return context


@functools.cache
def _server_with(first: str) -> forkserver.ForkServer:
    """A second one, in which the module ``first`` is imported before Megatron."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([first, *_IMPORTED_ONCE])
    # Some Pythons import these with their own sys.path, not with this process's.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        server.ensure_running()
    return server


def _die_with(parent: Any) -> None:
    while parent.is_alive():
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def _work(rank: int, jobs: Any, results: Any, saved: Any, first: str | None) -> None:
    # A process group of its own: Megatron's checkpoint writer forks, and all must go together.
    os.setpgrp()
    parent = multiprocessing.parent_process()
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if first is not None:
        importlib.import_module(first)
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from helpers.dispatchers import clear_dispatchers
    from helpers.interpreter import interpret_faster

    interpret_faster()
    # Megatron would make one at the first save, whose manager, a process, would import torch then.
    filesystem_async._results_queue = saved
    gc.freeze()  # what is imported is no garbage; to look through it takes longer than many a job
    while True:
        function, arguments, world_size, port = jobs.get()
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(port)
        try:
            results.put((rank, True, function(rank, world_size, *arguments)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        # A model holds its process groups in cycles, and each group has threads that poll: left to
        # pile up, they take the machine's time.
        clear_dispatchers()


class WorkerFailed(AssertionError):
    """A job raised on some rank; the message is that rank's traceback."""


class WorkerPool:
    """``run(function, world_size, *arguments)`` calls it on ranks 0 .. world_size - 1 at once.

    ``first`` names a module that each process imports before Megatron.
    """

    def __init__(self, size: int, *, timeout: float = 300.0, first: str | None = None) -> None:
        self.timeout = timeout
        self.num_jobs = 0
        if first is None:
            self._start(size, first)
            return
        start = _server_with(first).connect_to_new_process
        with mock.patch.object(forkserver, "connect_to_new_process", start):
            self._start(size, first)

    def _start(self, size: int, first: str | None) -> None:
        context = process_context()
        self.manager = context.Manager()
        self.saved = [self.manager.Queue() for _ in range(size)]
        self.results = context.Queue()
        self.jobs = [context.Queue() for _ in range(size)]
        self.processes = [
            # Not daemonic: Megatron's checkpoint writer starts processes of its own.
            context.Process(target=_work, args=(rank, jobs, self.results, saved, first))
            for rank, (jobs, saved) in enumerate(zip(self.jobs, self.saved, strict=True))
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        with reserved_port() as port:
            return self._run(port, function, world_size, *arguments)

    def _run(
        self, port: int, function: Callable[..., Any], world_size: int, *arguments: Any
    ) -> list[Any]:
        self.num_jobs += 1
        for jobs in self.jobs[:world_size]:
            jobs.put((function, arguments, world_size, port))
        returned: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout
        while len(returned) < world_size:
            rank, succeeded, value = self._next_result(deadline)
            if not succeeded:
                self.close()  # the other ranks may wait for this one forever
                raise WorkerFailed(f"rank {rank} of {world_size}:\n{value}")
            returned[rank] = value
        return [returned[rank] for rank in range(world_size)]

    def failures(
        self, function: Callable[..., Any], world_size: int, *arguments: Any, expected: int
    ) -> dict[int, str]:
        """The first ``expected`` tracebacks of a job that fails; the pool is used up afterwards."""
        found: dict[int, str] = {}
        with reserved_port() as port:
            for jobs in self.jobs[:world_size]:
                jobs.put((function, arguments, world_size, port))
            deadline = time.monotonic() + self.timeout
            while len(found) < expected:
                rank, succeeded, value = self._next_result(deadline)
                if rank < 0 or succeeded:
                    break
                found[rank] = value
            self.close()
        return found

    def _next_result(self, deadline: float) -> tuple[int, bool, Any]:
        while time.monotonic() < deadline:
            try:
                return self.results.get(timeout=0.5)
            except queue.Empty:
                for rank, process in enumerate(self.processes):
                    if not process.is_alive():
                        return rank, False, f"died with exit status {process.exitcode}"
        return -1, False, f"no answer within {self.timeout} s"

    @property
    def usable(self) -> bool:
        """Whether another test may run here: alive, and not full of earlier tests' threads."""
        return self.num_jobs < _MOST_JOBS and all(p.is_alive() for p in self.processes)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        self.manager.shutdown()
