"""A model that is cut into stages where a GPU has other tiles for the parts than for the whole."""

import pytest
import torch
from helpers.fused import Case, operands, run_kernels

from mhc_megatron.kernels.triton.tiles import default_tiles


@pytest.mark.parametrize(("n", "tokens"), [(4, 4096), (4, 8192), (8, 4096)])
def test_pre_has_the_bits_of_post_pre(n: int, tokens: int) -> None:
    case = Case(n=n, tokens=tokens, channels=1288, dtype=torch.bfloat16)
    leaves = operands(case, torch.device("cuda"))
    whole = run_kernels(case, leaves)
    alone = Case(operation="pre", n=n, tokens=tokens, channels=1288, dtype=torch.bfloat16)
    cut = run_kernels(alone, {**leaves, "streams": whole["streams"]})
    assert set(cut) < set(whole)
    for name, expected in cut.items():
        assert torch.equal(whole[name], expected), name


def test_they_do_have_other_tiles() -> None:
    assert default_tiles(4, 4096, 1288, torch.bfloat16).pre is None
    assert default_tiles(4, 8192, 1288, torch.bfloat16).pre is not None
