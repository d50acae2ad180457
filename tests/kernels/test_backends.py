"""Which implementation is chosen, and what wrong arguments are told."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.fused import Case, arguments, operands, run_kernels

from mhc_megatron.kernels import MappingOptions, choose_backend, finite_inputs, post_pre
from mhc_megatron.kernels.triton.arguments import INTERPRETED


def streams(n: int = 4, channels: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(2, n, channels, dtype=dtype)


def test_auto_never_takes_the_interpreter() -> None:
    choice = choose_backend(streams())
    assert choice.name == "reference"
    reason = "the interpreter is for tests" if INTERPRETED else "the kernels need CUDA"
    assert reason in choice.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_takes_the_kernels_on_a_gpu() -> None:
    assert choose_backend(streams().cuda()).name == "triton"
    assert choose_backend(streams(dtype=torch.float64).cuda()).name == "reference"


def test_a_backend_that_was_asked_for() -> None:
    assert choose_backend(streams(), backend="reference") == ("reference", "asked for")
    with pytest.raises(
        ValueError, match="backend='cuda' is not one of auto, triton, native, reference"
    ):
        choose_backend(streams(), backend="cuda")


@pytest.mark.parametrize(
    ("tensor", "projection", "message"),
    [
        (streams(n=5), "sinkhorn", "num_streams=5 is not one of 1, 2, 3, 4, 8"),
        (streams(n=8), "permutation", "projection='permutation' needs num_streams <= 4"),
        (streams(channels=12), "sinkhorn", "channels=12 is not a multiple of 8"),
        (
            streams(dtype=torch.float64),
            "sinkhorn",
            "streams are torch.float64, not bfloat16, float16 or float32",
        ),
        (streams().transpose(0, 1), "sinkhorn", "num_streams=2"),
        (streams(n=8, channels=4).transpose(1, 2), "sinkhorn", "streams are not contiguous"),
    ],
)
def test_backend_cannot_run(tensor: torch.Tensor, projection: str, message: str) -> None:
    options = MappingOptions(projection=projection)
    if message == "num_streams=2":
        message = "streams are not contiguous"
    with pytest.raises(ValueError, match=re.escape(f"backend='triton' cannot run: {message}")):
        choose_backend(tensor, options=options, backend="triton")
    assert choose_backend(tensor, options=options) == ("reference", message)


def test_without_triton_and_without_a_gpu_the_reference_runs() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from mhc_megatron import kernels\n"
        "x = torch.ones(2, 4, 8)\n"
        "options = kernels.MappingOptions()\n"
        "gates = (torch.ones(1),) * 3\n"
        "u, mix = kernels.pre(x, torch.ones(24, 32), gates, torch.ones(24), options=options)\n"
        "assert kernels.post(x, u, mix).shape == x.shape\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda t: t[:-1], r"weight: expected shape (24, 160), got (23, 160)"),
        ("bias", lambda t: t[:-1], "bias: expected shape (24,), got (23,)"),
        ("alpha_pre", lambda t: t[0], "alpha_pre: expected shape (1,), got ()"),
        ("alpha_res", lambda t: None, "alpha_res: expected [1], got None"),
        ("branch", lambda t: t[:, :-8], "branch: expected shape (5, 40), got (5, 32)"),
        ("mix_post", lambda t: t[:-1], "mix.post: expected shape (5, 4), got (4, 4)"),
        ("weight", lambda t: t.bfloat16(), "weight: expected torch.float32, got torch.bfloat16"),
        ("weight", lambda t: t.t().contiguous().t(), "weight: expected contiguous memory"),
        ("streams", lambda t: t.long(), "streams: expected floating [..., n, C]"),
    ],
)
def test_a_wrong_argument_is_named(
    name: str, change: object, message: str, device: torch.device
) -> None:
    case = Case()
    leaves = operands(case, device)
    leaves[name] = change(leaves[name])
    with pytest.raises(ValueError, match=re.escape(message)):
        run_kernels(case, leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "none"}, "projection='none' is not one of sinkhorn"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"rms_eps": -1.0}, "rms_eps=-1.0 must be at least 0"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MappingOptions(**options)


def test_mappings_of_another_state_are_refused(device: torch.device) -> None:
    case = Case()
    positional, _ = arguments(replace(case, operation="pre"), operands(case, device))
    from mhc_megatron.kernels import pre

    _, mix = pre(*positional, options=case.options, backend="triton")
    positional, keywords = arguments(case, operands(replace(case, tokens=7), device))
    positional[2] = mix
    with pytest.raises(ValueError, match=r"mix: expected mappings of 4 streams and tokens \(7,\)"):
        post_pre(*positional, **keywords, backend="triton")


def test_leading_dimensions_are_kept(device: torch.device) -> None:
    case = Case()
    leaves = operands(replace(case, tokens=6), device)
    shaped = {
        name: leaf.unflatten(0, (3, 2)) if leaf is not None and leaf.shape[0] == 6 else leaf
        for name, leaf in leaves.items()
    }
    got, flat = run_kernels(case, shaped), run_kernels(case, leaves)
    for name, value in got.items():
        assert value.shape[:2] == (3, 2)
        assert torch.equal(value.flatten(0, 1), flat[name]), name


@pytest.mark.parametrize("name", ["streams", "branch", "weight", "alpha_post", "bias", "mix_res"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_a_number_that_is_not_finite_is_named_when_checking(
    name: str, number: float, device: torch.device
) -> None:
    case = Case()
    leaves = operands(case, device)
    leaves[name].view(-1)[-1] = number
    run_kernels(case, leaves)  # unchecked: no wait for the GPU
    named = name.replace("mix_", "mix.")
    message = f"{named}: expected finite numbers, 1 of {leaves[name].numel()} are not"
    with finite_inputs(), pytest.raises(ValueError, match=re.escape(message)):
        run_kernels(case, leaves)
    run_kernels(case, leaves)


def test_checking_accepts_finite_numbers(device: torch.device) -> None:
    with finite_inputs():
        run_kernels(Case(), operands(Case(), device))
