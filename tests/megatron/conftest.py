"""One pool of worker processes for all layout tests; replaced after a job has failed."""

from collections.abc import Iterator

import pytest
from helpers.pool import WorkerPool
from packaging.version import Version

from mhc_megatron.megatron.compat import core_version

MAX_RANKS = 4
# Of the two tested releases of megatron-core one has the training loop; test_training_loop.py
# shows that the other is refused.
_OF_THE_LOOP = ["test_pretrain.py", "test_loop_upcycle.py"]
collect_ignore = [] if core_version() >= Version("0.19") else _OF_THE_LOOP


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
