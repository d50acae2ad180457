"""Launches of the backward, as those of launch.py.

``scratch``: what its kernels leave to each other, in one allocation; the plan has its parts.
"""

import torch
from torch import Tensor

from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.launch import aligned
from mhc_megatron.kernels.triton.plan import Plan
from mhc_megatron.kernels.triton.tape import Tape


def scratch_of(plan: Plan) -> Tensor:
    """Its memory, not filled."""
    return torch.empty(plan.scratch_size, dtype=torch.float32, device=plan.device)


def mix_backward(
    plan: Plan,
    stream: int | Tape | None,
    scratch: Tensor,
    new_streams: Tensor,
    grad_u: Tensor,
    grad_packed: Tensor | None,
    raw: Tensor,
    packed: Tensor,
    parameters: Parameters,
    norm_weight: Tensor | None,
    inverse_rms: Tensor | None,
) -> Tensor:
    """The gradients of the coefficients, in ``scratch``; returns the gradient of u before its norm.

    ``grad_u`` is of what ``mix`` returned; ``packed`` are the mappings that read u.
    """
    grad_read = norm_packed = norm_sums = None
    if norm_weight is not None:
        grad_read = torch.empty_like(grad_u)
        norm_packed, norm_sums = packed, scratch
    _, alpha_pre, alpha_post, alpha_res, bias = parameters
    plan.mix_bwd[grad_packed is not None](
        stream,
        new_streams,
        grad_u,
        grad_packed,
        raw,
        alpha_pre,
        alpha_post,
        alpha_res,
        bias,
        plan.matrices,
        scratch,
        scratch,
        scratch,
        scratch if plan.iterates else None,
        norm_packed,
        norm_weight,
        inverse_rms,
        grad_read,
        norm_sums,
    )
    return grad_u if grad_read is None else grad_read


def streams_backward(
    plan: Plan,
    stream: int | Tape | None,
    scratch: Tensor | None,
    grad_streams: Tensor | None,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    grad_u: Tensor | None,
    read_packed: Tensor | None,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of streams, branch and the mappings that wrote, of up to four streams.

    ``grad_u`` is that before its norm; the last three are those of the sublayer that reads the
    streams. None of them, nor of scratch, for ``post`` alone.
    """
    grad_x, grad_branch = torch.empty_like(streams), torch.empty_like(branch)
    grad_packed = torch.empty_like(packed)
    plan.streams_bwd[grad_streams is not None](
        stream,
        grad_streams,
        grad_u,
        streams,
        branch,
        branch_bias,
        packed,
        read_packed,
        scratch,
        scratch,
        factors,
        grad_x,
        grad_branch,
        grad_packed,
    )
    return grad_x, grad_branch, grad_packed


def wide_streams_backward(
    plan: Plan,
    stream: int | Tape | None,
    scratch: Tensor | None,
    grad_streams: Tensor,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    new_streams: Tensor | None,
    grad_u: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of many streams.

    With ``scratch`` ``grad_streams`` is of ``pre_backward``, and its memory is that of the result;
    the last two are read in a single pass alone.
    """
    grad_x = torch.empty_like(streams) if scratch is None else grad_streams
    grad_branch, grad_packed = torch.empty_like(branch), torch.empty_like(packed)
    single_pass = scratch is not None and plan.single_pass
    plan.wide_streams_bwd(
        stream,
        grad_streams,
        scratch if plan.scale_width else None,
        grad_u if single_pass else None,
        streams,
        new_streams if single_pass else None,
        branch,
        branch_bias,
        packed,
        grad_x,
        grad_branch,
        grad_packed,
    )
    return grad_x, grad_branch, grad_packed


def weight_backward(
    plan: Plan,
    stream: int | Tape | None,
    scratch: Tensor,
    new_streams: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
) -> Tensor:
    """phi's gradient, [M, K] float32, or where it is to be added to: ``main_grad``.

    Complete without ``plan.has_weight_sums``; else ``parameter_backward`` makes it of its sums.
    """
    grad = torch.empty_like(weight) if main_grad is None else main_grad
    if plan.weight_on_hopper:
        new_streams = aligned(new_streams)
    plan.weight_bwd(stream, new_streams, scratch, scratch if plan.has_weight_sums else grad)
    return grad


def pre_backward(
    plan: Plan,
    stream: int | Tape | None,
    scratch: Tensor,
    grad_streams: Tensor | None,
    streams: Tensor,
    grad_u: Tensor,
    packed: Tensor,
    factors: Tensor,
    weight: Tensor | None,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Of ``pre`` alone: the gradient of the streams, and phi's as of ``weight_backward``; without
    ``weight`` that is not wanted. Of many streams also of ``post_pre``, and then the former is what
    ``wide_streams_backward`` takes."""
    grad_x = torch.empty_like(streams)
    grad = sums = None
    if weight is not None:
        grad = torch.empty_like(weight) if main_grad is None else main_grad
        sums = scratch if plan.has_weight_sums else grad
    scales = (scratch if plan.scale_width else None,) if plan.wide or plan.on_hopper else ()
    plan.pre_bwd[grad_streams is not None, weight is not None](
        stream,
        grad_streams,
        grad_u,
        streams,
        packed,
        scratch,
        scratch,
        factors,
        grad_x,
        *scales,
        sums,
    )
    return grad_x, grad


def parameter_backward(
    plan: Plan,
    stream: int | Tape | None,
    scratch: Tensor,
    grad_weight: Tensor,
    norm_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of alpha_pre, alpha_post, alpha_res, also if there is none, bias and a norm's weight; and
    ``grad_weight`` is made of its sums."""
    # One allocation of the small ones; the alphas side by side, as the kernel writes them.
    small = torch.empty(plan.small_size, dtype=torch.float32, device=plan.device)
    bias, *_, alpha_pre, alpha_post, alpha_res = small.split_with_sizes(plan.small)
    grad_norm = norm_sums = None
    if norm_weight is not None:
        grad_norm, norm_sums = torch.empty_like(norm_weight), scratch
    plan.reduce_partials(
        stream,
        scratch if plan.has_weight_sums else grad_weight,
        scratch,
        norm_sums,
        grad_weight,
        bias,
        alpha_pre,
        grad_norm,
    )
    return alpha_pre, alpha_post, alpha_res, bias, grad_norm
