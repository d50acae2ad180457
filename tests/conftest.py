"""Without a GPU, Triton kernels run in Triton's interpreter.

Triton reads the variable when it is first imported, which a test of any folder may do.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
