"""Blocks of e4m3 on Triton: the bytes of the reference, and its numbers back, to the bit."""

import math

import pytest
import torch
from torch import Tensor

from mhc_megatron.kernels import fp8_blocks

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 128


def both(tensor: Tensor, block: int = BLOCK) -> Tensor:
    """The bytes of the kernels, after comparing them and what they are unpacked to."""
    packed = fp8_blocks.pack(tensor, block=block, backend="triton")
    assert torch.equal(packed, fp8_blocks.pack(tensor, block=block, backend="reference"))
    for dtype in FLOATS:
        found, expected = (
            fp8_blocks.unpack(packed, tensor.shape, dtype, block=block, backend=backend)
            for backend in ("triton", "reference")
        )
        assert found.dtype == dtype and found.shape == tensor.shape
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(1.0), expected.nan_to_num(1.0))
        assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | found.isnan())
    return packed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_of_all_sizes(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for exponent in (-140, -60, -9, 0, 9, 60, 110):
        sizes = torch.randn(5, 3, 1, generator=generator).mul(8).exp2()
        numbers = torch.randn(5, 3, BLOCK, generator=generator) ** 3 * sizes
        tensor = (numbers.double() * 2.0**exponent).to(dtype).view(5, 3 * BLOCK)
        assert len(both(tensor.to(device)).unique()) > 2 or exponent in (-140, -60, 60, 110)


def test_every_bfloat16_number(device: torch.device) -> None:
    """Alone in its block, and beside one that is larger; with every number that is none."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    tensor = torch.zeros(len(every), 8, dtype=torch.bfloat16)
    tensor[:, 0] = every
    tensor[:, 5] = every.nan_to_num(posinf=1.0, neginf=1.0) / 3
    both(tensor.to(device), block=8)


def test_ties_go_to_even(device: torch.device) -> None:
    """Halves between all neighbours of e4m3, normal and not, and what is next to them."""
    held = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (held[1:] + held[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))])
    tensor = torch.full((len(near), 8), 448.0)
    tensor[:, 1], tensor[:, 2] = near, -near
    codes = both(tensor.to(device), block=8)[: tensor.numel()].view(-1, 8)
    assert (codes[: len(ties), 1] % 2 == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ends_of_the_range(dtype: torch.dtype, device: torch.device) -> None:
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    values = [0.0, -0.0, info.max, -info.max, info.tiny, least, -least, 3 * least, math.nan]
    values += [math.inf, -math.inf, 448.0, 449.0, 2.0**-126 if dtype != torch.float16 else 1.0]
    tensor = torch.zeros(len(values) ** 2, 8, dtype=torch.float64)
    for row, (a, b) in enumerate((a, b) for a in values for b in values):
        tensor[row, 1], tensor[row, 6] = a, b
    both(tensor.to(dtype).to(device), block=8)
    # Where a 448th part of the largest is no number.
    steps = torch.arange(1, 600, dtype=torch.int32).view(torch.float32)
    tiny = torch.zeros(len(steps), 8)
    tiny[:, 3] = steps
    both(tiny.to(device), block=8)


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (33, 1, 256)], ids=str)
def test_any_number_of_blocks(shape: tuple[int, ...], device: torch.device) -> None:
    tensor = torch.randn(shape, device=device)
    packed = torch.full_like(both(tensor), 255)
    assert packed.numel() == tensor.numel() * 129 // 128
    # A view of another one is packed in its own order.
    turned = torch.randn(256, 4, device=device).t()
    assert torch.equal(both(turned), both(turned.contiguous()))


def test_what_is_not_whole_blocks_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 130\) is not made of blocks of 128"):
        fp8_blocks.pack(torch.zeros(2, 130, device=device), block=BLOCK)
    with pytest.raises(ValueError, match=r"streams are torch\.float64"):
        fp8_blocks.pack(torch.zeros(1, 128, device=device).double(), block=BLOCK, backend="triton")
