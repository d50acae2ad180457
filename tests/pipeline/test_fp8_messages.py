"""Messages in blocks of e4m3: what is rounded, by how much, and a pipeline that sends them."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mhc_megatron.message_blocks import MessageBlocks
from mhc_megatron.pipeline.actions import Transfer
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.executor import execute
from mhc_megatron.pipeline.fp8_size import BLOCK, packed_size
from mhc_megatron.pipeline.fp8_transport import FP8Transport
from mhc_megatron.pipeline.in_process import InProcessTransport, run_ranks
from mhc_megatron.pipeline.lower import lower_rank
from mhc_megatron.pipeline.stage import AutogradStage
from mhc_megatron.pipeline.transport import Message

CODEC = MessageBlocks(backend="reference")
pack, unpack = CODEC.pack, CODEC.unpack
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EVERY_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
SHAPE = (3, 2, 2 * BLOCK)


def rounded(tensor: Tensor) -> Tensor:
    return unpack(pack(tensor), tensor.shape, tensor.dtype)


def drawn(seed: int, exponent: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Numbers of very different sizes: exponential in their blocks, and between them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(*shape[:-1], shape[-1] // BLOCK, 1, generator=generator)
    numbers = torch.randn(*sizes.shape[:-1], BLOCK, generator=generator) ** 3
    return (numbers * (8 * sizes).exp2() * 2.0**exponent).view(shape)


def test_the_bytes() -> None:
    block = torch.full((BLOCK,), -3.0)
    block[0] = 1.0
    block[1] = 0.0
    # 3 / 448 lies between 2^-8 and 2^-7, and 3 2^7 = 1.5 2^8 and 2^7 are 0 1111 100 and 0 1110 000.
    assert pack(block).tolist() == [0b1110000, 0, *[0b11111100] * (BLOCK - 2), 127 - 7]
    both = torch.stack([block, 448 * torch.ones(BLOCK)])
    assert pack(both).tolist() == [
        *pack(block).tolist()[:-1],
        *[0b1111110] * BLOCK,
        127 - 7,
        127,
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(-90, 90))
def test_every_number_becomes_the_nearest_of_its_block(seed: int, exponent: int) -> None:
    tensor = drawn(seed, exponent)
    blocks = tensor.double().view(-1, BLOCK)
    scales = pack(tensor)[tensor.numel() :].double().sub(127).exp2()
    largest = blocks.abs().amax(1)
    assert (largest <= 448 * scales).all(), "none is cut off"
    assert (largest > 224 * scales).all(), "no smaller power of two would do"
    held = EVERY_E4M3[EVERY_E4M3.isfinite()]
    nearest = torch.stack(
        [(held * s - b[:, None]).abs().amin(1) for s, b in zip(scales, blocks, strict=True)]
    )
    assert torch.equal((rounded(tensor).double().view(-1, BLOCK) - blocks).abs(), nearest)
    # Half of the last of four bits, or of the least step below the normal numbers, 2^-9.
    step = torch.maximum(blocks.abs() / 16, scales[:, None] * 2.0**-10)
    assert (nearest <= step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_again_changes_nothing(dtype: torch.dtype) -> None:
    for seed in range(50):
        once = rounded(drawn(seed, -8).to(dtype))
        assert once.dtype == dtype and torch.equal(rounded(once), once)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_ends_of_the_range_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    edges = torch.zeros(4, BLOCK, dtype=dtype)
    edges[1] = info.tiny
    edges[2, ::2] = -info.max / 2
    edges[3] = 3.0
    edges[3, 5:8] = torch.tensor([math.nan, math.inf, -math.inf])
    found = rounded(edges)
    assert torch.equal(found[0], edges[0])
    assert torch.equal(found[1], edges[1])
    assert torch.allclose(found[2, ::2], edges[2, ::2], rtol=1 / 16)
    assert (found[2, 1::2] == 0).all()
    assert found[3, 5:8].isnan().all(), "a guard sees what is not finite"
    assert (found[3, :5] == 3).all() and (found[3, 8:] == 3).all()


def test_sizes() -> None:
    assert packed_size((4096, 1, 4 * 2560)) == 4096 * 10240 * 129 // 128
    for shape in ((), (4, 64), (128, 130)):
        with pytest.raises(ValueError, match="not made of blocks of 128"):
            packed_size(shape)
    with pytest.raises(ValueError, match=r"\(129,\) bytes are not those of a message \(2, 128\)"):
        unpack(pack(torch.zeros(BLOCK)), (2, BLOCK), torch.float32)


class _Hop(torch.autograd.Function):
    """Between ranks: the state and its gradient are rounded."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return rounded(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return rounded(grad)


class Counting(InProcessTransport):
    """Counts bytes."""

    sent = 0

    def send(self, transfer: Transfer, tensor: Tensor) -> None:
        assert tensor.dtype == torch.uint8
        Counting.sent += tensor.nbytes
        super().send(transfer, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["one_f_one_b", "zb_h1", "dualpipe_v"])
def test_a_pipeline_equals_a_loop_that_rounds_between_ranks(name: str, dtype: torch.dtype) -> None:
    schedule = generate(name, num_ranks=3, num_mb=6)
    torch.manual_seed(0)
    shape, last = (2, 1, BLOCK), schedule.num_stages - 1
    ours, theirs = (
        [nn.Linear(BLOCK, BLOCK, dtype=dtype) for _ in range(schedule.num_stages)] for _ in "ab"
    )
    for a, b in zip(ours, theirs, strict=True):
        b.load_state_dict(a.state_dict())
    samples = [drawn(mb, -3, shape).to(dtype) for mb in range(schedule.num_mb)]

    def run(block: nn.Module, number: int, x: Tensor) -> Tensor:
        y = x + torch.tanh(block(x))
        return y.float().square().mean() if number == last else y

    def stage(number: int) -> AutogradStage:
        return AutogradStage(
            lambda mb, x: run(ours[number], number, samples[mb] if x is None else x)
        )

    def rank(transport: InProcessTransport) -> dict[int, Tensor]:
        counted = Counting(transport.exchange, transport.rank)
        return execute(
            lower_rank(schedule, transport.rank),
            {number: stage(number) for number in schedule.placement.stages_on(transport.rank)},
            FP8Transport(counted, CODEC),
            num_stages=schedule.num_stages,
            message=Message(shape=shape, dtype=dtype, device=torch.device("cpu")),
        )

    Counting.sent = 0
    losses = {mb: loss for output in run_ranks(rank, 3) for mb, loss in output.items()}
    places = [schedule.placement.rank_of(number, 0) for number in range(schedule.num_stages)]
    hops = sum(a != b for a, b in itertools.pairwise(places))
    assert Counting.sent == 2 * hops * schedule.num_mb * packed_size(shape)
    differs = False
    for mb, sample in enumerate(samples):
        x = plain = sample
        for number, block in enumerate(theirs):
            if number and places[number] != places[number - 1]:
                x = _Hop.apply(x)
            x = run(block, number, x)
            with torch.no_grad():
                plain = run(block, number, plain)
        x.backward()
        assert torch.equal(losses[mb], x.detach())
        differs |= not torch.equal(plain, x.detach())
    assert differs, "the hops round"
    for a, b in zip(ours, theirs, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.grad is not None and torch.equal(p.grad, q.grad)
