"""A rank that fails in a step over gloo: its neighbours say which message they miss, in time."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import stages
from helpers.pool import WorkerPool, process_context

from mhc_megatron.launch.port import reserved_port

TIMEOUT = 3.0


@pytest.fixture
def lone_workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(3, timeout=60.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_failing_rank_is_named_by_its_neighbours(how: str, lone_workers: WorkerPool) -> None:
    lone_workers.run(stages.with_failing_rank, 3, "not at all", TIMEOUT)
    start = time.monotonic()
    expected = 2 if how == "hangs" else 3
    failures = lone_workers.failures(stages.with_failing_rank, 3, how, TIMEOUT, expected=expected)
    assert time.monotonic() - start < TIMEOUT + 10
    # Rank 1 makes 1I3 of its forward; the others wait for what comes after micro-batch 2, or find
    # that nobody is there any more when they want to receive it.
    assert re.search(r"pipeline rank 0 failed at (post|recv) 1I", failures[0])
    assert re.search(r"pipeline rank 2 failed at (post|recv) 1F3 from 1", failures[2])


@pytest.mark.parametrize(("how", "status"), [("dies", 7), ("stalls", 1)])
def test_every_process_exits_with_an_error(how: str, status: int, tmp_path: Path) -> None:
    """Also the one that stalls, once it goes on: its neighbours are gone."""
    context = process_context()
    with reserved_port() as port:
        processes = [
            context.Process(
                target=stages.failing_process,
                args=(rank, 3, port, how, TIMEOUT, str(tmp_path / f"{rank}.txt")),
            )
            for rank in range(3)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + 120  # most of it for starting on a busy machine
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            assert [process.exitcode for process in processes] == [1, status, 1]
        finally:
            for process in processes:
                process.kill()
    for rank, what in ((0, r"(post|recv) 1I\d from 1"), (2, "(post|recv) 1F3 from 1")):
        text = (tmp_path / f"{rank}.txt").read_text()
        assert re.search(f"ExecutionError: pipeline rank {rank} failed at {what}", text), text
        assert float(re.search(r"failed after (\d+\.\d) s", text)[1]) < TIMEOUT + 5
