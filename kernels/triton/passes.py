"""What forward and backward of each operation launch, in order: no autograd.

``stream`` is what ``Plan.stream`` returned, or a ``Tape`` that takes the launches down.
Saved for a backward are the operands, then what the forward kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_megatron.kernels.triton import backward_launch, launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.plan import Plan
from mhc_megatron.kernels.triton.tape import Tape

Tensors = tuple[Tensor | None, ...]
Stream = int | Tape | None


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One of ``post``, ``pre`` and ``post_pre``; the last is ``single_pass`` too, as its plan says.

    Attributes:
        name: for messages.
        forward: (plan, stream, *operands) to results, and what is kept beside the operands.
        backward: (plan, stream, saved, gradients of the results, trains, main_grad) to those of the
            operands, but for a branch's bias. ``trains``: whether those of parameters are wanted.
        parameters: which operands are some.
        filled: the result whose gradient is zeros where there is none.
        unused: the result that has no gradient.
        branch, bias: operands; the bias's gradient is a sum of the branch's.
    """

    name: str
    forward: Callable[..., tuple[Tensors, Tensors]]
    backward: Callable[..., Tensors]
    num_operands: int
    num_results: int
    parameters: tuple[int, ...] = ()
    filled: int | None = None
    unused: int | None = None
    branch: int | None = None
    bias: int | None = None

    def trains(self, operands: Sequence[Tensor | None]) -> bool:
        """Whether a gradient of a parameter is wanted."""
        for index in self.parameters:
            tensor = operands[index]
            if tensor is not None and tensor.requires_grad:
                return True
        return False

    def gradients(
        self,
        plan: Plan,
        saved: Tensors,
        grads: Sequence[Tensor | None],
        trains: bool = True,
        main_grad: Tensor | None = None,
    ) -> Tensors:
        """Of all operands, from those of the results as autograd has them."""
        if not plan.num_tokens:
            return self._zeros(saved, main_grad)
        given = [None if grad is None else grad.contiguous() for grad in grads]
        if self.filled is not None and given[self.filled] is None:
            streams = saved[0]
            assert streams is not None
            given[self.filled] = streams.new_zeros(plan.shape_of_input(streams))
        found = self.backward(plan, plan.stream(), saved, given, trains, main_grad)
        if self.bias is None or self.branch is None or saved[self.bias] is None:
            return found
        return (
            *found[: self.bias],
            _bias_gradient(found[self.branch], saved[self.bias]),
            *found[self.bias + 1 :],
        )

    def _zeros(self, saved: Tensors, main_grad: Tensor | None) -> Tensors:
        """Where there is no token."""
        added = self.parameters[:1] if main_grad is not None else ()
        return tuple(
            None if tensor is None or index in added else torch.zeros_like(tensor)
            for index, tensor in enumerate(saved[: self.num_operands])
        )


def _bias_gradient(grad_branch: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    assert grad_branch is not None and branch_bias is not None
    summed = grad_branch.flatten(0, -2).sum(dim=0, dtype=torch.float32)
    return summed.to(branch_bias.dtype)


def _post_forward(
    plan: Plan,
    stream: Stream,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
) -> tuple[Tensors, Tensors]:
    return (launch.post(plan, stream, streams, branch, branch_bias, packed),), ()


def _post_backward(
    plan: Plan,
    stream: Stream,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    trains: bool,
    main_grad: Tensor | None,
) -> Tensors:
    streams, branch, branch_bias, packed = saved
    state = (streams, branch, branch_bias, packed)
    if plan.wide:
        grad_x, grad_branch, grad_packed = backward_launch.wide_streams_backward(
            plan, stream, None, grads[0], *state, None, None
        )
    else:
        grad_x, grad_branch, grad_packed = backward_launch.streams_backward(
            plan, stream, None, grads[0], *state, None, None, None
        )
    return grad_x, grad_branch, None, grad_packed


def _pre_forward(
    plan: Plan,
    stream: Stream,
    streams: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
) -> tuple[Tensors, Tensors]:
    parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
    factors, kept_factors = launch.factor_weight(plan, stream, weight)
    _, u, raw, packed, inverse_rms = launch.mix(
        plan, stream, streams, None, None, None, factors, parameters, norm_weight
    )
    return (u, packed, streams, inverse_rms), (packed, raw, kept_factors, inverse_rms)


def _pre_backward(
    plan: Plan,
    stream: Stream,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    trains: bool,
    main_grad: Tensor | None,
) -> Tensors:
    streams, weight, alpha_pre, alpha_post, alpha_res, bias, norm_weight, *kept = saved
    packed, raw, factors, inverse_rms = kept
    parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
    grad_u, grad_packed, grad_through, _ = grads
    scratch = backward_launch.scratch_of(plan)
    grad_u = backward_launch.mix_backward(
        plan,
        stream,
        scratch,
        streams,
        grad_u,
        grad_packed,
        raw,
        packed,
        parameters,
        norm_weight,
        inverse_rms,
    )
    trains = trains or plan.has_norm
    grad_streams, grad_weight = backward_launch.pre_backward(
        plan,
        stream,
        scratch,
        grad_through,
        streams,
        grad_u,
        packed,
        factors,
        weight if trains else None,
        main_grad,
    )
    return grad_streams, *_parameter_gradients(
        plan, stream, scratch, grad_weight, main_grad, alpha_res, norm_weight
    )


def _post_pre_forward(
    plan: Plan,
    stream: Stream,
    streams: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    packed: Tensor,
    weight: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor | None,
    bias: Tensor,
    norm_weight: Tensor | None,
) -> tuple[Tensors, Tensors]:
    parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
    factors, kept_factors = launch.factor_weight(plan, stream, weight)
    new_streams, u, raw, new_packed, inverse_rms = launch.mix(
        plan, stream, streams, branch, branch_bias, packed, factors, parameters, norm_weight
    )
    kept = (new_streams, new_packed, raw, kept_factors, inverse_rms)
    return (new_streams, u, new_packed, inverse_rms), kept


def _post_pre_backward(
    plan: Plan,
    stream: Stream,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    trains: bool,
    main_grad: Tensor | None,
) -> Tensors:
    streams, branch, branch_bias, packed, weight, alpha_pre, alpha_post, *rest = saved
    alpha_res, bias, norm_weight, new_streams, new_packed, raw, factors, inverse_rms = rest
    parameters = Parameters(weight, alpha_pre, alpha_post, alpha_res, bias)
    grad_streams, grad_u, grad_new_packed, _ = grads
    read_packed = packed if plan.single_pass else new_packed
    scratch = backward_launch.scratch_of(plan)
    grad_u = backward_launch.mix_backward(
        plan,
        stream,
        scratch,
        new_streams,
        grad_u,
        grad_new_packed,
        raw,
        read_packed,
        parameters,
        norm_weight,
        inverse_rms,
    )
    state = (streams, branch, branch_bias, packed)
    trained = weight if trains or plan.has_norm else None
    grad_weight = None
    if plan.wide:
        grad_streams, grad_weight = backward_launch.pre_backward(
            plan,
            stream,
            scratch,
            grad_streams,
            new_streams,
            grad_u,
            read_packed,
            factors,
            trained,
            main_grad,
        )
    elif trained is not None:
        # Right after the first pass, whose last reads of the streams are still in L2.
        grad_weight = backward_launch.weight_backward(
            plan, stream, scratch, new_streams, weight, main_grad
        )
    of_parameters = _parameter_gradients(
        plan, stream, scratch, grad_weight, main_grad, alpha_res, norm_weight
    )
    if plan.wide:
        grad_x, grad_branch, grad_packed = backward_launch.wide_streams_backward(
            plan, stream, scratch, grad_streams, *state, new_streams, grad_u
        )
    else:
        grad_x, grad_branch, grad_packed = backward_launch.streams_backward(
            plan, stream, scratch, grad_streams, *state, grad_u, read_packed, factors
        )
    return grad_x, grad_branch, None, grad_packed, *of_parameters


def _parameter_gradients(
    plan: Plan,
    stream: Stream,
    scratch: Tensor,
    grad_weight: Tensor | None,
    main_grad: Tensor | None,
    alpha_res: Tensor | None,
    norm_weight: Tensor | None,
) -> Tensors:
    """In the order of ``Parameters``, and the norm's weight's; without ``grad_weight`` none."""
    if grad_weight is None:
        return None, None, None, None, None, None
    grad_pre, grad_post, grad_res, grad_bias, grad_norm = backward_launch.parameter_backward(
        plan, stream, scratch, grad_weight, norm_weight
    )
    return (
        grad_weight if main_grad is None else None,
        grad_pre,
        grad_post,
        None if alpha_res is None else grad_res,
        grad_bias,
        grad_norm,
    )


POST = Operation(
    name="post",
    forward=_post_forward,
    backward=_post_backward,
    num_operands=4,
    num_results=1,
    branch=1,
    bias=2,
)
PRE = Operation(
    name="pre",
    forward=_pre_forward,
    backward=_pre_backward,
    num_operands=7,
    num_results=4,
    parameters=(1, 2, 3, 4, 5),
    filled=0,
    unused=3,
)
POST_PRE = Operation(
    name="post_pre",
    forward=_post_pre_forward,
    backward=_post_pre_backward,
    num_operands=10,
    num_results=4,
    parameters=(4, 5, 6, 7, 8),
    filled=1,
    unused=3,
    branch=1,
    bias=2,
)
