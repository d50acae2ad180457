"""One pool of worker processes for all layout tests; replaced after a job has failed."""

from collections.abc import Iterator

import pytest
from helpers.pool import WorkerPool

MAX_RANKS = 4


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[WorkerPool]]:
    pools: list[WorkerPool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def workers(_pools: list[WorkerPool]) -> WorkerPool:
    if not _pools or not _pools[-1].usable:
        for pool in _pools:
            pool.close()
        _pools[:] = [WorkerPool(MAX_RANKS)]
    return _pools[-1]
