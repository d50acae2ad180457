"""These tests need a GPU and Transformer Engine, and fail without; ``make test-gpu`` runs them.

Every kernel is asked for the order of its sums that it repeats: the tests compare bits.
"""

import os
from collections.abc import Iterator

os.environ |= {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # a queue for every lane
    "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1",  # of checkpoints that the tests write themselves
}

import pytest
import torch

from mhc_megatron.cudnn import load_torchs_cudnn

load_torchs_cudnn()  # before Transformer Engine looks for one

from helpers import engine  # noqa: E402
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _single_process() -> Iterator[None]:
    """Megatron's process groups, one rank each, for all tests."""
    assert torch.cuda.is_available(), "tests/gpu needs a GPU that torch can use"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with engine.single_process():
        yield


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Megatron's table of losses by MoE layer has the size of the first model."""
    yield
    destroy_moe_metrics_tracker()
