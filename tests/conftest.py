"""Without a GPU, Triton kernels run in Triton's interpreter; random numbers are the same each time.

Triton reads the variable when it is first imported, which a test of any folder may do. And one pool
of worker processes for all tests that need several; replaced after a job has failed.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import interpreter
from helpers.pool import WorkerPool

MAX_RANKS = 4
# The files that take longest, a quarter of a minute and more; what is begun last should be short,
# or one of two workers has nothing to do in the end.
LONGEST = (
    "test_compiles.py",
    "test_overlap.py",
    "test_pretrain.py",
    "test_training.py",
    "test_schedules.py",
    "test_killed.py",
    "test_engine_specs.py",
    "test_interrupted.py",
    "test_recompute_layouts.py",
    "test_layouts.py",
    "test_virtual_ranks.py",
    "test_main_grad.py",
    "test_overlap_benchmark.py",
    "test_upcycle.py",
    "test_flex.py",
    "test_lane_gradients.py",
    "test_async_save.py",
    "test_guard.py",
    "test_wide.py",
    "test_native.py",
    "test_recompute_benchmark.py",
    "test_phases.py",
    "test_multigpu.py",
    "test_tracing.py",
    "test_fused.py",
)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    interpreter.interpret_faster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``LONGEST`` first, in its order; the others as they were found."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


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


@pytest.fixture(scope="module")
def deep_ep_workers() -> Iterator[WorkerPool]:
    """With a stand-in for DeepEP; what it does not show, ``fake_deep_ep`` says."""
    pool = WorkerPool(MAX_RANKS, first="helpers.with_deep_ep")
    yield pool
    pool.close()
