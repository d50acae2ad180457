"""A rank that fails in a step over gloo: its neighbours say which message they miss, in time."""

import time
from collections.abc import Iterator

import pytest
from helpers import stages
from helpers.pool import WorkerPool

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
    # Rank 1 makes 1I3 of its forward; the others wait for what comes after micro-batch 2.
    assert "pipeline rank 0 failed at recv 1I" in failures[0]
    assert "pipeline rank 2 failed at recv 1F3 from 1" in failures[2]
