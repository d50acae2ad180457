"""One hyper-connection around one residual branch, whoever the branch is."""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mhc_megatron import kernels
from mhc_megatron.branch_norm import BranchNorm
from mhc_megatron.config import MHCConfig
from mhc_megatron.main_grad import AddedToMainGrad, main_grad_of
from mhc_megatron.precision import KeepFP32, float32_parameter

# Logits far enough apart that the mapping starts near its target, near enough to be learnt.
_BIAS = 3.0
_PERMUTATION_BIAS = -8.0

_LOGGER = logging.getLogger(__name__)

Mix = kernels.Mappings | kernels.PackedMappings
# Runs a kernel with its operands and settings, and returns what that returns.
Observer = Callable[..., Any]


class MappingProjection(nn.Module):
    """Phi of one hyper-connection: ``weight`` [M, n*C], float32.

    As ``HyperConnection`` at every call, it takes what it owns from its dictionaries: an attribute
    of a module that is a parameter or a module is what Python finds last.

    With ``gradient_accumulation_fusion``, backward adds its gradient to Megatron's ``main_grad``.
    """

    def __init__(self, *, num_logits: int, width: int, gradient_accumulation_fusion: bool) -> None:
        super().__init__()
        self.weight = float32_parameter(num_logits, width)
        self.gradient_accumulation_fusion = gradient_accumulation_fusion

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Phi [M, n*C], and the buffer [M, n*C] that the kernels are to add its gradient to."""
        weight = self._parameters["weight"]
        assert weight is not None
        main_grad = main_grad_of(weight) if self.gradient_accumulation_fusion else None
        return weight if main_grad is None else AddedToMainGrad.apply(weight), main_grad


class HyperConnection(KeepFP32):
    """``x' = H_res x + H_post^T F(H_pre x)`` (mHC paper, Eq. 3) for a caller-supplied branch F.

    With ``mhc.variant="single_pass"`` (DeepSeek-V4.1) F reads with the previous hyper-connection's
    H_pre, and this one's is for the next.

    The three mappings depend on the token: they are projected from the RMS-normalised n*C vector
    (Eq. 7) and brought onto their manifolds (Eq. 8, 9). All parameters are float32 and named as in
    Megatron's own implementation: ``mapping_proj.weight`` [M, n*C], ``alpha_pre``,
    ``alpha_post``, ``alpha_res`` [1], ``bias`` [M], packed pre | post | res.

    Args:
        mhc: number of streams, projection, iterations, eps.
        hidden_size: C.
        sublayer: zero-based depth of the branch in the model (attention 2l, MLP 2l + 1); the
            initialisation reads most from stream ``sublayer mod n``, its home stream.
            Under ``single_pass`` this H_pre starts at the next branch's home stream.
        gradient_accumulation_fusion: as in Megatron's configuration: under its DDP, the kernels
            add phi's gradient to ``main_grad``. The same bits.

    Attributes:
        observer: runs the calls of the kernels, ``observer(kernel, *operands, **settings)``, and
            sees what goes in and comes out; None for nobody. ``post_pre`` is seen by the observer
            of the hyper-connection whose mappings it makes.
    """

    def __init__(
        self,
        mhc: MHCConfig,
        *,
        hidden_size: int,
        sublayer: int,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__()
        self.mhc = mhc
        self.num_streams = mhc.num_streams
        self.sublayer = sublayer
        self.mapping_proj = MappingProjection(
            num_logits=mhc.num_logits,
            width=mhc.num_streams * hidden_size,
            gradient_accumulation_fusion=gradient_accumulation_fusion,
        )
        self.alpha_pre = float32_parameter(1)
        self.alpha_post = float32_parameter(1)
        self.alpha_res = float32_parameter(1) if mhc.num_res_logits else None
        self.bias = float32_parameter(mhc.num_logits)
        self._options = kernels.MappingOptions(
            projection=mhc.projection,
            iterations=mhc.sinkhorn_iterations,
            eps=mhc.sinkhorn_eps,
            rms_eps=mhc.rms_eps,
        )
        self._announced = False
        self._chosen: dict[tuple[torch.dtype, torch.device, bool], str] = {}
        self.observer: Observer | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The mHC paper's initialisation (ICML version, appendix A.6; docs/math.md)."""
        nn.init.zeros_(self.mapping_proj.weight)
        for alpha in (self.alpha_pre, self.alpha_post, self.alpha_res):
            if alpha is not None:
                alpha.fill_(self.mhc.init_gate)
        reader = self.sublayer + (self.mhc.variant == "single_pass")
        self.bias.copy_(initial_bias(self.mhc, home_stream=reader % self.num_streams))

    def forward(self) -> tuple[Tensor, kernels.Gates, Tensor, Tensor | None]:
        """Phi [M, n*C], the three gates [1], the bias [M], and phi's ``main_grad``, if the kernels
        are to add to it: for ``pre`` and ``post_pre``.

        Parameters are read through calls of the modules that own them: Megatron's DDP waits in
        their forward hooks for parameters that are still being gathered (overlap_param_gather).
        """
        own, projection = self._parameters, self._modules["mapping_proj"]
        alpha_pre, alpha_post, bias = own["alpha_pre"], own["alpha_post"], own["bias"]
        assert projection is not None
        assert alpha_pre is not None and alpha_post is not None and bias is not None
        weight, main_grad = projection()
        return weight, (alpha_pre, alpha_post, own.get("alpha_res")), bias, main_grad

    def pre(self, streams: Tensor, *, norm: BranchNorm | None = None) -> tuple[Tensor, Mix]:
        """The streams read with H_pre, and the coefficients that ``post`` needs.

        Args:
            streams: [s, b, n*C], any floating dtype.
            norm: of the branch. Where the kernels run they apply it, and ``normalises`` is true of
                the mappings; elsewhere it is the caller's to call.

        Returns:
            ([s, b, C] in the streams' dtype, the float32 mappings per token). The first is the
            branch's input, under ``single_pass`` nobody's.

        Raises:
            ValueError: ``mhc.backend="triton"`` cannot run here, and why.
        """
        self._announce(streams)
        norm_weight, norm_eps = self._norm_of(norm, streams)
        weight, gates, bias, main_grad = self()
        branch_input, mix = self._run(
            kernels.pre,
            streams,
            weight,
            gates,
            bias,
            options=self._options,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            main_grad=main_grad,
            num_streams=self.num_streams,
            backend=self.mhc.backend,
        )
        return branch_input, mix

    def post(
        self, streams: Tensor, branch: Tensor, mix: Mix, *, branch_bias: Tensor | None = None
    ) -> Tensor:
        """The next streams from the branch's output.

        Args:
            streams: [s, b, n*C], what ``pre`` read.
            branch: [s, b, C], the branch's output.
            mix: what ``pre`` returned.
            branch_bias: [C] added to the branch's output, or None.

        Returns:
            [s, b, n*C] in the streams' dtype.
        """
        return self._run(
            kernels.post,
            self._read_by(mix, streams),
            branch,
            mix,
            branch_bias=branch_bias,
            num_streams=self.num_streams,
            backend=self.mhc.backend,
        )

    def post_pre(
        self,
        streams: Tensor,
        branch: Tensor,
        mix: Mix,
        following: "HyperConnection",
        *,
        branch_bias: Tensor | None = None,
        norm: BranchNorm | None = None,
    ) -> tuple[Tensor, Tensor, Mix]:
        """``post`` of this branch and ``following.pre``, in one call of the kernels.

        Under ``single_pass`` the next branch's input is ``read`` with this branch's mappings.

        Args:
            streams, branch, mix, branch_bias: as for ``post``.
            following: the hyper-connection around the next branch.
            norm: of the next branch, as for ``pre``.

        Returns:
            The next streams [s, b, n*C], the next branch's input [s, b, C] and its mappings.
        """
        weight, gates, bias, main_grad = following()
        operands = (self._read_by(mix, streams), branch, mix, weight, gates, bias)
        settings: dict[str, Any] = {
            "options": following._options,
            "branch_bias": branch_bias,
            "main_grad": main_grad,
            "num_streams": self.num_streams,
            "backend": self.mhc.backend,
        }
        if self.mhc.variant == "single_pass":
            return following._run(kernels.single_pass, *operands, **settings)
        norm_weight, norm_eps = following._norm_of(norm, streams)
        norms = {"norm_weight": norm_weight, "norm_eps": norm_eps}
        return following._run(kernels.post_pre, *operands, **norms, **settings)

    def _norm_of(
        self, norm: BranchNorm | None, streams: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """Weight and eps of a norm that the kernels apply; None of what is left to the caller."""
        if norm is None:
            return None, None
        # Of what the choice depends on, all that varies between calls of a module, but for the
        # current device, which the kernels' functions look at themselves.
        kind = streams.dtype, streams.device, streams.is_contiguous()
        chosen = self._chosen.get(kind)
        if chosen is None:
            chosen = self._chosen[kind] = self._choice(streams).name
        return (norm(), norm.eps) if chosen == "triton" else (None, None)

    def _choice(self, streams: Tensor) -> kernels.BackendChoice:
        """What runs for these streams, [s, b, n*C]."""
        x = self._unflatten(streams.detach())
        return kernels.choose_backend(x, options=self._options, backend=self.mhc.backend)

    def read(self, next_streams: Tensor, mix: Mix) -> Tensor:
        """The next branch's input under ``single_pass``, where ``post_pre`` is not to be had.

        Args:
            next_streams: [s, b, n*C], what ``post`` returned.
            mix: this branch's mappings.

        Returns:
            [s, b, C] in the streams' dtype.
        """
        return self._run(kernels.pre_mix, self._unflatten(next_streams), mix.pre)

    def _read_by(self, mix: Mix, streams: Tensor) -> Tensor:
        """``streams`` as the tensor that ``pre`` read, by which the kernels know it again."""
        source = mix.source if isinstance(mix, kernels.PackedMappings) else None
        if source is not None and source.data_ptr() == streams.data_ptr():
            return source
        return streams

    def _unflatten(self, streams: Tensor) -> Tensor:
        return streams.unflatten(-1, (self.num_streams, -1))

    def _announce(self, streams: Tensor) -> None:
        if self.mhc.backend == "auto" and not self._announced:
            self._announced = True
            _log_once(self._choice(streams), on_gpu=streams.is_cuda)

    def _run(self, kernel: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
        if self.observer is None:
            return kernel(*operands, **settings)
        return self.observer(kernel, *operands, **settings)


def mappings_to(record: Callable[[Tensor], None]) -> Observer:
    """An observer that hands every H_res [..., n, n], without its graph, to ``record``."""

    def observer(kernel: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
        returned = kernel(*operands, **settings)
        mix = returned[-1] if isinstance(returned, tuple) else None
        if isinstance(mix, Mix):
            record(mix.res.detach())
        return returned

    return observer


def normalises(mix: Mix) -> bool:
    """Whether the branch's input that came with these mappings is normalised already."""
    return isinstance(mix, kernels.PackedMappings) and mix.inverse_rms is not None


def tensors_of(mix: Mix) -> tuple[Tensor | None, ...]:
    """The memory of a sublayer's mappings, for those who move between streams."""
    if isinstance(mix, kernels.PackedMappings):
        return mix.packed, mix.inverse_rms
    return tuple(mix)


def graph_of(mix: Mix) -> tuple[Tensor, ...]:
    """What ``post`` with these mappings sends gradients to, beside streams and branch."""
    if isinstance(mix, kernels.PackedMappings):
        return (mix.packed,) if mix.through is None else (mix.packed, mix.through)
    return tuple(mix)


def with_graph(mix: Mix, tensors: Sequence[Tensor]) -> Mix:
    """The same mappings with other tensors of the same numbers for those of ``graph_of``."""
    if isinstance(mix, kernels.PackedMappings):
        packed, *through = tensors
        return replace(mix, packed=packed, through=through[0] if through else None)
    return kernels.Mappings(*tensors)


@functools.cache
def _log_once(choice: kernels.BackendChoice, *, on_gpu: bool) -> None:
    """Say which kernels ``auto`` took, a warning where a GPU goes without the fused ones."""
    slow = on_gpu and choice.name == "reference"
    level = logging.WARNING if slow else logging.INFO
    _LOGGER.log(level, "hyper-connections use backend=%r: %s", choice.name, choice.reason)


def initial_bias(mhc: MHCConfig, *, home_stream: int) -> Tensor:
    """The bias [M] whose mappings make the streams start as plain residual copies.

    ``H_post`` starts at 1 and every row of ``H_res`` sums to 1, so equal streams stay equal and
    the model computes the plain residual network's function; only which stream ``H_pre`` reads
    most differs from sublayer to sublayer.

    Args:
        mhc: the projection and the number of streams.
        home_stream: the stream that ``H_pre`` reads most.

    Returns:
        [M] float32, packed pre | post | res.
    """
    n = mhc.num_streams
    identity = torch.eye(n)
    home = identity[home_stream]
    if mhc.projection == "unconstrained":  # hyper-connections: B = 1, A_m = e_home, A_r = I
        return torch.cat([home, torch.ones(n), identity.flatten()])
    pre, post = 2 * _BIAS * home - _BIAS, torch.zeros(n)
    if mhc.projection == "identity":
        return torch.cat([pre, post])
    if mhc.projection == "permutation":
        straight = [order == tuple(range(n)) for order in itertools.permutations(range(n))]
        res = torch.where(torch.tensor(straight), 0.0, _PERMUTATION_BIAS)
    else:
        res = (2 * _BIAS * identity - _BIAS).flatten()
    return torch.cat([pre, post, res])
