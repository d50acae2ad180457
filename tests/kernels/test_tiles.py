"""The table of tiles, and what it depends on."""

from dataclasses import replace

import pytest
import torch

from mhc_megatron.kernels.triton.tiles import MULTIPROCESSORS, default_tiles


@pytest.mark.parametrize(
    ("tokens", "of_a_program"),
    [(0, 32), (1, 32), (4096, 32), (4224, 32), (4225, 64), (8192, 64), (8449, 32), (16384, 64)],
)
def test_programs_of_mix_fwd_are_of_as_many_tokens_as_end_first(
    tokens: int, of_a_program: int
) -> None:
    assert default_tiles(4, tokens, torch.bfloat16).mix.tokens == of_a_program


def test_no_choice_takes_longer_than_the_other() -> None:
    """A program of 64 tokens takes 1.7 times as long as one of 32."""
    for tokens in range(64, 40_000, 64):
        chosen = default_tiles(4, tokens, torch.bfloat16).mix.tokens
        waves = {size: -(-tokens // (size * MULTIPROCESSORS)) for size in (32, 64)}
        costs = {32: waves[32], 64: 1.7 * waves[64]}
        assert costs[chosen] == min(costs.values()), tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_nothing_else_depends_on_the_number_of_tokens(n: int, dtype: torch.dtype) -> None:
    few, many = (default_tiles(n, tokens, dtype) for tokens in (4096, 8192))
    assert (few == many) == (n != 4 or dtype != torch.bfloat16)
    assert replace(few, mix=many.mix) == many
