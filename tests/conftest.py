"""Without a GPU, Triton kernels run in Triton's interpreter; random numbers are the same each time.

Triton reads the variable when it is first imported, which a test of any folder may do.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def drawn_numbers_do_not_change() -> None:
    """A test of chance numbers would fail by chance, on another commit than its own."""
    torch.manual_seed(0)
