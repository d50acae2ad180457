"""Where Hopper's own kernels run; test_gluon.py and tests/gpu tell what they compute."""

import importlib
import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import triton

from mhc_megatron.kernels import MappingOptions
from mhc_megatron.kernels.triton import buffers, hopper, launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.backward_launch import weight_backward
from mhc_megatron.kernels.triton.plan import plan_of
from mhc_megatron.kernels.triton.tiles import blocks
from mhc_megatron.launch import checks

CUDA = torch.device("cuda", 0)
EMPTY = torch.empty(0)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper.runs_on.cache_clear()
    yield
    monkeypatch.undo()
    importlib.reload(hopper)


def test_an_older_triton_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hopper.runs_on(CUDA)
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    importlib.reload(hopper)
    with pytest.warns(RuntimeWarning, match=r"need triton>=3\.6, not 3\.5\.1: those"):
        assert not hopper.runs_on(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.runs_on(CUDA)


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, and those of Hopper are among them."""
    monkeypatch.setattr(buffers, "INTERPRETED", False)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)


def shifted_streams(tokens: int, shift: int) -> torch.Tensor:
    """[tokens, 4, 64], that many numbers behind a multiple of 16 bytes."""
    memory = torch.randn(tokens * 4 * 64 + shift).bfloat16()
    return memory[shift:].view(tokens, 4, 64)


def test_no_other_device_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hopper.runs_on(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.runs_on(CUDA)


def test_the_doctor_knows_the_same_gpu_and_version() -> None:
    assert checks.HOPPER == hopper.HOPPER
    assert checks.HOPPER_TRITON.release == hopper.OLDEST_TRITON


@pytest.mark.parametrize(
    ("n", "tokens", "channels", "dtype", "options", "expected"),
    [
        (4, 4096, 2560, torch.bfloat16, {}, True),
        (4, 4096, 2560, torch.bfloat16, {"projection": "permutation"}, True),
        (8, 16, 8, torch.bfloat16, {}, True),
        (3, 4096, 2560, torch.bfloat16, {}, False),
        (4, 4096, 2560, torch.float16, {}, False),
        (4, 4096, 2560, torch.float32, {}, False),
        (4, 4104, 2560, torch.bfloat16, {}, False),
        # 48 rows of so many tokens are 2^31 numbers.
        (4, 44739248, 8, torch.bfloat16, {}, False),
        (4, 44739232, 8, torch.bfloat16, {}, True),
    ],
)
def test_what_they_can_copy_and_count(
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    options: dict,
    expected: bool,
) -> None:
    on_hopper(monkeypatch)
    streams = torch.empty(tokens, n, channels, dtype=dtype, device="meta")
    # Plans are remembered, by options as well: these are no other test's.
    plan = plan_of(streams, options=MappingOptions(rms_eps=0.125, **options))
    assert plan.on_hopper == expected
    monkeypatch.setattr(hopper, "runs_on", lambda device: False)
    assert not plan_of(streams, options=MappingOptions(rms_eps=0.25, **options)).on_hopper


@pytest.mark.parametrize(
    ("n", "dtype", "options", "expected"),
    [
        (4, torch.bfloat16, {}, True),
        (4, torch.bfloat16, {"projection": "permutation"}, True),
        (4, torch.bfloat16, {"projection": "identity"}, True),
        (2, torch.bfloat16, {}, False),
        (8, torch.bfloat16, {}, False),
        (4, torch.float16, {}, False),
    ],
)
def test_of_which_streams_the_forward_is_theirs(
    monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype, options: dict, expected: bool
) -> None:
    """Of any number of tokens, where the table has a tile."""
    on_hopper(monkeypatch)
    streams = torch.empty(17, n, 72, dtype=dtype, device="meta")
    plan = plan_of(streams, options=MappingOptions(rms_eps=0.0625, **options))
    assert plan.mixes_on_hopper == expected


@pytest.mark.parametrize(
    ("n", "tokens", "dtype", "expected"),
    [
        (1, 16, torch.bfloat16, True),
        (2, 16, torch.bfloat16, True),
        (4, 16, torch.bfloat16, True),
        (3, 16, torch.bfloat16, False),
        # Its gradient is made with the streams'.
        (8, 16, torch.bfloat16, False),
        (4, 17, torch.bfloat16, False),
        (4, 16, torch.float16, False),
        # As many as the test of numbers that 32 bits do not count has.
        (4, 209776, torch.bfloat16, True),
    ],
)
def test_of_which_boundaries_phis_gradient_is_theirs(
    monkeypatch: pytest.MonkeyPatch, n: int, tokens: int, dtype: torch.dtype, expected: bool
) -> None:
    """And none of ``pre`` alone."""
    on_hopper(monkeypatch)
    streams = torch.empty(tokens, n, 2560, dtype=dtype, device="meta")
    options = MappingOptions(rms_eps=0.015625)
    plan = plan_of(streams, streams[:, 0], options=options)
    assert plan.weight_on_hopper == expected
    if expected:
        assert plan.splits == blocks(tokens, plan.call.tiles.hopper_weight_split)
    assert not plan_of(streams, options=options).weight_on_hopper


@pytest.mark.parametrize("shift", [0, 1])
def test_phis_gradient_is_of_streams_that_begin_at_a_multiple_of_16_bytes(
    monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """Or of a copy of them."""
    on_hopper(monkeypatch)
    streams = shifted_streams(16, shift)
    plan = plan_of(streams, streams[:, 0], options=MappingOptions(rms_eps=0.0078125))
    launched: list[tuple] = []
    # In the place of a cached property.
    monkeypatch.setitem(vars(plan), "weight_bwd", lambda *given: launched.append(given))
    grad = weight_backward(plan, 7, EMPTY, streams, EMPTY, None)
    ((stream, y, scratch, sums),) = launched
    assert stream == 7 and scratch is EMPTY and sums is (EMPTY if plan.has_weight_sums else grad)
    assert torch.equal(y, streams) and y.data_ptr() % 16 == 0
    assert (y is streams) == (streams.data_ptr() % 16 == 0)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("operation", ["pre", "post_pre"])
def test_both_halves_of_the_forward_have_the_same_streams(
    monkeypatch: pytest.MonkeyPatch, operation: str, single_pass: bool, shift: int
) -> None:
    """Which begin at a multiple of 16 bytes, or a copy of them does."""
    on_hopper(monkeypatch)
    streams = shifted_streams(5, shift)
    branch = packed = None
    if operation == "post_pre":
        branch, packed = streams.view(-1)[: 5 * 64].view(5, 64), EMPTY
    plan = plan_of(
        streams, branch, options=MappingOptions(rms_eps=0.03125), single_pass=single_pass
    )
    launched: dict[str, tuple] = {}
    # In the place of cached properties.
    for name in ("hopper_mix_fwd", "read_fwd"):
        record = partial(lambda name, *given: launched.update({name: given}), name)
        monkeypatch.setitem(vars(plan), name, record)
    parameters = Parameters(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
    y, u, *_ = launch.mix(plan, 7, streams, branch, None, packed, EMPTY, parameters, None)
    stream, x, f, bias, given, factors, written, read, sums = launched["hopper_mix_fwd"]
    assert stream == 7 and bias is None and given is packed and factors is EMPTY
    assert torch.equal(x, streams) and x.data_ptr() % 16 == 0
    assert (x is streams) == (streams.data_ptr() % 16 == 0)
    if branch is None:
        assert f is None and written is x
    else:
        assert torch.equal(f, branch) and f.data_ptr() % 16 == 0 and written is y
    assert read is (u if single_pass else None)
    assert sums.numel() == plan.mix_sums
    assert launched["read_fwd"][1] is written and launched["read_fwd"][2] is sums
