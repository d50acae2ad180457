"""Where Hopper's own kernels run; what they compute, tests/gpu/test_hopper.py compares."""

import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch
import triton

from mhc_megatron.kernels import MappingOptions
from mhc_megatron.kernels.triton import buffers, hopper
from mhc_megatron.kernels.triton.plan import plan_of
from mhc_megatron.launch import checks

CUDA = torch.device("cuda", 0)


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
    with pytest.warns(RuntimeWarning, match=r"need triton>=3\.6, not 3\.5\.1: the kernels"):
        assert not hopper.runs_on(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.runs_on(CUDA)


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
    monkeypatch.setattr(buffers, "INTERPRETED", False)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
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
    monkeypatch.setattr(buffers, "INTERPRETED", False)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    streams = torch.empty(17, n, 72, dtype=dtype, device="meta")
    plan = plan_of(streams, options=MappingOptions(rms_eps=0.0625, **options))
    assert plan.mixes_on_hopper == expected
