"""Without a GPU, Triton kernels run in Triton's interpreter; random numbers are the same each time.

Triton reads the variable when it is first imported, which a test of any folder may do. And one pool
of worker processes for all tests that need several; replaced after a job has failed.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from helpers.pool import WorkerPool

MAX_RANKS = 4

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def drawn_numbers_do_not_change() -> None:
    """A test of chance numbers would fail by chance, on another commit than its own."""
    torch.manual_seed(0)


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
