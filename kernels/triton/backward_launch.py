"""Launches of the backward, as those of launch.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.plan import Plan


class ReadGradients(NamedTuple):
    """What ``streams_backward`` and ``pre_backward`` need of the sublayer that reads the streams.

    Attributes:
        u: gradient of u before its norm, [..., C].
        packed: that sublayer's mappings; with ``single_pass`` the previous ones'.
        projected: gradient of ``vec(x) phi``, [PARTS * M, T].
        radial: of the RMS, [T].
        factors: phi, of ``factor_weight``.
    """

    u: Tensor
    packed: Tensor
    projected: Tensor
    radial: Tensor
    factors: Tensor


class PartialSums(NamedTuple):
    """By programs of ``mix_bwd``: of alphas and bias, [2 M * programs], and of a norm's weight,
    [programs, C]."""

    small: Tensor
    norm: Tensor | None


def mix_backward(
    plan: Plan,
    stream: int | None,
    new_streams: Tensor,
    grad_u: Tensor,
    grad_packed: Tensor | None,
    raw: Tensor,
    packed: Tensor,
    factors: Tensor,
    parameters: Parameters,
    norm_weight: Tensor | None,
    inverse_rms: Tensor | None,
) -> tuple[ReadGradients, PartialSums]:
    """The gradients of the coefficients; ``grad_u`` is of what ``mix`` returned, ``packed`` the
    mappings that read u."""
    dtype, device = plan.dtype, plan.device
    projected = torch.empty(
        plan.parts * plan.num_logits, plan.num_tokens, dtype=plan.factor_dtype, device=device
    )
    # One allocation of all float32 scratch.
    scratch = torch.empty(plan.scratch_size, dtype=torch.float32, device=device)
    radial, history, partial = scratch.split_with_sizes(plan.scratch)
    grad_read, norm_sums, norm_packed = grad_u, None, None
    if norm_weight is not None:
        norm_packed = packed
        norm_sums = torch.empty(
            plan.mix_programs, plan.channels, dtype=torch.float32, device=device
        )
        grad_read = torch.empty_like(grad_u, dtype=dtype)
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
        projected,
        radial,
        partial,
        history if plan.iterates else None,
        norm_packed,
        norm_weight,
        inverse_rms,
        None if norm_sums is None else grad_read,
        norm_sums,
    )
    read = ReadGradients(grad_read, packed, projected, radial, factors)
    return read, PartialSums(partial, norm_sums)


def streams_backward(
    plan: Plan,
    stream: int | None,
    grad_streams: Tensor | None,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    read: ReadGradients | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of streams, branch and the mappings that wrote."""
    grad_x = torch.empty_like(streams)
    grad_branch = torch.empty_like(branch)
    grad_packed = torch.empty_like(packed)
    u, read_packed, projected, radial, factors = read or (None,) * len(ReadGradients._fields)
    for kernel in plan.streams_bwd[grad_streams is not None]:
        kernel(
            stream,
            grad_streams,
            u,
            streams,
            branch,
            branch_bias,
            packed,
            read_packed,
            projected,
            radial,
            factors,
            grad_x,
            grad_branch,
            grad_packed,
        )
    return grad_x, grad_branch, grad_packed


class WeightSums(NamedTuple):
    """phi's gradient, and its sums by tokens, from which ``parameter_backward`` makes it.

    Attributes:
        weight: the gradient, [M, K] float32; ``main_grad`` if there is one.
        partial: [splits, M, K] float32; ``weight`` itself where nothing is to be added up.
    """

    weight: Tensor
    partial: Tensor

    @classmethod
    def empty(cls, plan: Plan, weight: Tensor, main_grad: Tensor | None) -> "WeightSums":
        """For the sums of a kernel, to be added up in ``main_grad`` if there is one."""
        grad = torch.empty_like(weight) if main_grad is None else main_grad
        if not plan.has_weight_sums:
            return cls(grad, grad)
        rows, width = weight.shape
        size = plan.splits, rows, width
        return cls(grad, torch.empty(*size, dtype=torch.float32, device=plan.device))


def weight_backward(
    plan: Plan,
    stream: int | None,
    new_streams: Tensor,
    projected: Tensor,
    weight: Tensor,
    main_grad: Tensor | None,
) -> WeightSums:
    """phi's gradient from all tokens; with ``main_grad`` to be added to it."""
    sums = WeightSums.empty(plan, weight, main_grad)
    plan.weight_bwd(stream, new_streams, projected, sums.partial)
    return sums


def pre_backward(
    plan: Plan,
    stream: int | None,
    grad_streams: Tensor | None,
    streams: Tensor,
    read: ReadGradients,
    weight: Tensor,
    main_grad: Tensor | None,
    *,
    trains: bool,
) -> tuple[Tensor, WeightSums | None]:
    """Of ``pre`` alone: the gradient of the streams, and with ``trains`` phi's."""
    grad_x = torch.empty_like(streams)
    sums = WeightSums.empty(plan, weight, main_grad) if trains else None
    plan.pre_bwd[grad_streams is not None, trains](
        stream,
        grad_streams,
        read.u,
        streams,
        read.packed,
        read.projected,
        read.radial,
        read.factors,
        grad_x,
        None if sums is None else sums.partial,
    )
    return grad_x, sums


def parameter_backward(
    plan: Plan,
    stream: int | None,
    sums: WeightSums,
    partial: PartialSums,
    norm_weight: Tensor | None,
) -> tuple[Parameters, Tensor | None]:
    """The sums of all partial sums, in the shapes of the parameters, also of an alpha that there is
    not; and the gradient of a norm's weight."""
    # One allocation of the small ones; the alphas side by side, as the kernel writes them.
    small = torch.empty(plan.small_size, dtype=torch.float32, device=plan.device)
    bias, *_, alpha_pre, alpha_post, alpha_res = small.split_with_sizes(plan.small)
    grad_norm = None if norm_weight is None else torch.empty_like(norm_weight)
    weight, of_weight = sums
    plan.reduce_partials(
        stream, of_weight, partial.small, partial.norm, weight, bias, alpha_pre, grad_norm
    )
    return Parameters(weight, alpha_pre, alpha_post, alpha_res, bias), grad_norm
