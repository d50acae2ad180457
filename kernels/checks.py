"""Arguments of the functional API: a wrong one is named, with what was expected."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.packed import PackedMappings
from mhc_megatron.kernels.reference import Mappings

_finite = False


@contextmanager
def finite_inputs() -> Iterator[None]:
    """Inside, every call of this process also checks that what it is given is finite.

    For finding the first NaN or infinity: each check waits for the GPU, and tracing is refused.
    """
    global _finite
    before, _finite = _finite, True
    try:
        yield
    finally:
        _finite = before


def check_streams(streams: Tensor) -> None:
    if streams.dim() < 2 or not streams.is_floating_point():
        raise ValueError(
            f"streams: expected floating [..., n, C], got {streams.dtype} {tuple(streams.shape)}"
        )
    _expect_finite("streams", streams)


def check_parameters(
    streams: Tensor,
    weight: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor,
    options: MappingOptions,
) -> None:
    n, channels = streams.shape[-2:]
    num_logits = options.num_logits(n)
    _expect("weight", weight, (num_logits, n * channels), streams.device)
    _expect("bias", bias, (num_logits,), streams.device)
    names = ("alpha_pre", "alpha_post", "alpha_res")
    if len(alphas) != len(names):
        raise ValueError(f"alphas: expected {', '.join(names)}, got {len(alphas)} tensors")
    for name, alpha in zip(names, alphas, strict=True):
        if name == "alpha_res" and options.projection == "identity":
            if alpha is not None:
                raise ValueError("alpha_res: expected None, projection='identity' has no res gate")
        elif alpha is None:
            raise ValueError(f"{name}: expected [1], got None")
        else:
            _expect(name, alpha, (1,), streams.device)


def check_branch(streams: Tensor, branch: Tensor, branch_bias: Tensor | None) -> None:
    shape = (*streams.shape[:-2], streams.shape[-1])
    _expect("branch", branch, shape, streams.device)
    if branch_bias is not None:
        _expect("branch_bias", branch_bias, shape[-1:], streams.device)


def check_mix(streams: Tensor, mix: Mappings | PackedMappings) -> None:
    tokens, n = streams.shape[:-2], streams.shape[-2]
    if isinstance(mix, PackedMappings):
        shape = (n * (n + 2), tokens.numel())
        if mix.num_streams != n or mix.tokens != tokens:
            raise ValueError(
                f"mix: expected mappings of {n} streams and tokens {tuple(tokens)}, got "
                f"{mix.num_streams} and {tuple(mix.tokens)}"
            )
        _expect("mix.packed", mix.packed, shape, streams.device)
        return
    _expect("mix.pre", mix.pre, (*tokens, n), streams.device)
    _expect("mix.post", mix.post, (*tokens, n), streams.device)
    _expect("mix.res", mix.res, (*tokens, n, n), streams.device)


def check_rebuilt(streams: Tensor, states: list[Tensor], branch_inputs: list[Tensor]) -> None:
    """Memory that the states and branch inputs of a block can be written to."""
    branch_shape = (*streams.shape[:-2], streams.shape[-1])
    for name, tensors, shape in (
        ("out.streams", states, tuple(streams.shape)),
        ("out.branch_inputs", branch_inputs, branch_shape),
    ):
        for tensor in tensors:
            _expect(name, tensor, shape, streams.device)
            if tensor.dtype != streams.dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: expected contiguous {streams.dtype}, got {tensor.dtype} with strides "
                    f"{tensor.stride()}"
                )


def check_kernel_operands(**operands: Tensor | None) -> None:
    """What only the kernels ask: float32 parameters and mappings, contiguous memory."""
    for name, operand in operands.items():
        if operand is None:
            continue
        if not operand.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {operand.stride()}")
        half_too = name in ("branch", "branch_bias")
        allowed = (torch.float32, torch.bfloat16, torch.float16) if half_too else (torch.float32,)
        if operand.dtype not in allowed:
            raise ValueError(f"{name}: expected {allowed[0]}, got {operand.dtype}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device} as the streams, got {tensor.device}")
    _expect_finite(name, tensor)


def _expect_finite(name: str, tensor: Tensor) -> None:
    if not _finite:
        return
    if torch.compiler.is_compiling():
        raise ValueError("finite_inputs: expected eager calls, a trace has no numbers to check")
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise ValueError(f"{name}: expected finite numbers, {wrong} of {tensor.numel()} are not")
