"""Arguments of the functional API: a wrong one is named, with what was expected."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mhc_megatron.kernels.options import NORM_EPS, MappingOptions
from mhc_megatron.kernels.packed import PackedMappings
from mhc_megatron.kernels.reference import Mappings

_finite = False

_GATES = ("alpha_pre", "alpha_post", "alpha_res")
# What the kernels read the branch, its bias and its norm's weight in; the rest is float32.
_BRANCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def check_streams(streams: Tensor, num_streams: int | None = None) -> Tensor:
    """The streams as [..., n, C], which ``num_streams`` gives as [..., n*C]."""
    if num_streams is not None:
        streams = _unflattened(streams, num_streams)
    if streams.dim() < 2 or not streams.is_floating_point():
        raise ValueError(
            f"streams: expected floating [..., n, C], got {streams.dtype} {tuple(streams.shape)}"
        )
    if _finite:
        _expect_finite("streams", streams)
    return streams


def _unflattened(streams: Tensor, num_streams: int) -> Tensor:
    if num_streams < 1:
        raise ValueError(f"num_streams={num_streams} must be at least 1")
    if streams.dim() < 1 or streams.shape[-1] % num_streams:
        raise ValueError(
            f"streams: expected [..., {num_streams}*C] with num_streams={num_streams}, got "
            f"{tuple(streams.shape)}"
        )
    return streams.unflatten(-1, (num_streams, -1))


def check_hidden(hidden: Tensor, num_streams: int) -> None:
    if hidden.dim() < 1 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: expected floating [..., C], got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if num_streams < 1:
        raise ValueError(f"num_streams={num_streams} must be at least 1")
    if _finite:
        _expect_finite("hidden", hidden)


def check_head(streams: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
    n, channels = streams.shape[-2:]
    _expect("weight", weight, (n, n * channels), streams.device)
    _expect("scale", scale, (1,), streams.device)
    _expect("bias", bias, (n,), streams.device)


def check_parameters(
    streams: Tensor,
    weight: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor,
    options: MappingOptions,
) -> None:
    shape, device = streams.shape, streams.device
    num_logits = options.num_logits(shape[-2])
    _expect("weight", weight, (num_logits, shape[-2] * shape[-1]), device)
    _expect("bias", bias, (num_logits,), device)
    if len(alphas) != len(_GATES):
        raise ValueError(f"alphas: expected {', '.join(_GATES)}, got {len(alphas)} tensors")
    for name, alpha in zip(_GATES, alphas, strict=True):
        if name == "alpha_res" and options.projection == "identity":
            if alpha is not None:
                raise ValueError("alpha_res: expected None, projection='identity' has no res gate")
        elif alpha is None:
            raise ValueError(f"{name}: expected [1], got None")
        else:
            _expect(name, alpha, (1,), device)


def check_main_grad(streams: Tensor, weight: Tensor, main_grad: Tensor | None) -> None:
    """A buffer that phi's gradient can be added to, which a trace cannot see happen."""
    if main_grad is None:
        return
    if is_traced(streams):
        raise ValueError("main_grad: expected None while tracing, which would not see it change")
    _expect("main_grad", main_grad, tuple(weight.shape), streams.device)
    if main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad: expected contiguous torch.float32, got {main_grad.dtype} with strides "
            f"{main_grad.stride()}"
        )


def check_norm(streams: Tensor, norm_weight: Tensor | None, norm_eps: float | None) -> float:
    """The weight of the branch's norm, and its eps, which is nothing by itself; returns the eps."""
    if norm_weight is None:
        if norm_eps is not None:
            raise ValueError(f"norm_eps: expected None without norm_weight, got {norm_eps}")
        return NORM_EPS
    _expect("norm_weight", norm_weight, streams.shape[-1:], streams.device)
    if not norm_weight.is_floating_point():
        raise ValueError(f"norm_weight: expected a floating dtype, got {norm_weight.dtype}")
    if norm_eps is None:
        return NORM_EPS
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps={norm_eps} must be at least 0")
    return norm_eps


def is_traced(streams: Tensor) -> bool:
    """Whether torch.compile, torch.export or FakeTensor asks what would be computed."""
    return torch.compiler.is_compiling() or isinstance(streams, FakeTensor)


def may_be_known(streams: Tensor) -> bool:
    """Whether sizes and dtypes are all that is checked: no trace, no search for a NaN."""
    return not (_finite or torch.compiler.is_compiling() or isinstance(streams, FakeTensor))


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
        if operand.dtype is torch.float32:
            continue
        if name not in ("branch", "branch_bias", "norm_weight"):
            raise ValueError(f"{name}: expected torch.float32, got {operand.dtype}")
        if operand.dtype not in _BRANCH_DTYPES:
            names = ", ".join(map(str, _BRANCH_DTYPES))
            raise ValueError(f"{name}: expected one of {names}, got {operand.dtype}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device} as the streams, got {tensor.device}")
    if _finite:
        _expect_finite(name, tensor)


def _expect_finite(name: str, tensor: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("finite_inputs: expected eager calls, a trace has no numbers to check")
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise ValueError(f"{name}: expected finite numbers, {wrong} of {tensor.numel()} are not")
