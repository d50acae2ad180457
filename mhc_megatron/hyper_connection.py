"""One hyper-connection around one residual branch, whoever the branch is."""

import functools
import itertools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhc_megatron import kernels
from mhc_megatron.config import MHCConfig
from mhc_megatron.precision import KeepFP32, float32_parameter

# Logits far enough apart that the mapping starts near its target, near enough to be learnt.
_BIAS = 3.0
_PERMUTATION_BIAS = -8.0

_LOGGER = logging.getLogger(__name__)

Mix = kernels.Mappings | kernels.PackedMappings


class MappingProjection(nn.Module):
    """Phi of one hyper-connection: ``weight`` [M, n*C], float32. A call returns it."""

    def __init__(self, *, num_logits: int, width: int) -> None:
        super().__init__()
        self.weight = float32_parameter(num_logits, width)

    def forward(self) -> Tensor:
        """[M, n*C]."""
        return self.weight


class HyperConnection(KeepFP32):
    """``x' = H_res x + H_post^T F(H_pre x)`` (mHC paper, Eq. 3) for a caller-supplied branch F.

    The three mappings depend on the token: they are projected from the RMS-normalised n*C vector
    (Eq. 7) and brought onto their manifolds (Eq. 8, 9). All parameters are float32 and named as in
    Megatron's own implementation: ``mapping_proj.weight`` [M, n*C], ``alpha_pre``,
    ``alpha_post``, ``alpha_res`` [1], ``bias`` [M], packed pre | post | res.

    Args:
        mhc: number of streams, projection, iterations, eps.
        hidden_size: C.
        sublayer: zero-based depth of the branch in the model (attention 2l, MLP 2l + 1); the
            initialisation reads most from stream ``sublayer mod n``, its home stream.
    """

    def __init__(self, mhc: MHCConfig, *, hidden_size: int, sublayer: int) -> None:
        super().__init__()
        self.mhc = mhc
        self.num_streams = mhc.num_streams
        self.sublayer = sublayer
        self.mapping_proj = MappingProjection(
            num_logits=mhc.num_logits, width=mhc.num_streams * hidden_size
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
        self.observer: Callable[[Tensor], None] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The mHC paper's initialisation (ICML version, appendix A.6; docs/math.md)."""
        nn.init.zeros_(self.mapping_proj.weight)
        for alpha in (self.alpha_pre, self.alpha_post, self.alpha_res):
            if alpha is not None:
                alpha.fill_(self.mhc.init_gate)
        self.bias.copy_(initial_bias(self.mhc, home_stream=self.sublayer % self.num_streams))

    def forward(self) -> tuple[Tensor, kernels.Gates, Tensor]:
        """Phi [M, n*C], the three gates [1] and the bias [M], for ``pre`` and ``post_pre``.

        Parameters are read through calls of the modules that own them: Megatron's DDP waits in
        their forward hooks for parameters that are still being gathered (overlap_param_gather).
        """
        gates = (self.alpha_pre, self.alpha_post, self.alpha_res)
        return self.mapping_proj(), gates, self.bias

    def pre(self, streams: Tensor) -> tuple[Tensor, Mix]:
        """The branch's input and the coefficients that ``post`` needs.

        Args:
            streams: [s, b, n*C], any floating dtype.

        Returns:
            ([s, b, C] in the streams' dtype, the float32 mappings per token).

        Raises:
            ValueError: ``mhc.backend="triton"`` cannot run here, and why.
        """
        x = self._unflatten(streams)
        self._announce(x)
        branch_input, mix = kernels.pre(x, *self(), options=self._options, backend=self.mhc.backend)
        self._observe(mix)
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
        x = self._read_by(mix, streams)
        return kernels.post(
            x, branch, mix, branch_bias=branch_bias, backend=self.mhc.backend
        ).flatten(-2)

    def post_pre(
        self,
        streams: Tensor,
        branch: Tensor,
        mix: Mix,
        following: "HyperConnection",
        *,
        branch_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Mix]:
        """``post`` of this branch and ``following.pre``, in one pass over the streams.

        Args:
            streams, branch, mix, branch_bias: as for ``post``.
            following: the hyper-connection around the next branch.

        Returns:
            The next streams [s, b, n*C], the next branch's input [s, b, C] and its mappings.
        """
        next_streams, branch_input, next_mix = kernels.post_pre(
            self._read_by(mix, streams),
            branch,
            mix,
            *following(),
            options=following._options,
            branch_bias=branch_bias,
            backend=self.mhc.backend,
        )
        following._observe(next_mix)
        return next_streams.flatten(-2), branch_input, next_mix

    def _read_by(self, mix: Mix, streams: Tensor) -> Tensor:
        """``streams`` as the tensor that ``pre`` read, by which the kernels know it again."""
        source = mix.source if isinstance(mix, kernels.PackedMappings) else None
        if source is not None and source.data_ptr() == streams.data_ptr():
            return source
        return self._unflatten(streams)

    def _unflatten(self, streams: Tensor) -> Tensor:
        return streams.unflatten(-1, (self.num_streams, -1))

    def _announce(self, x: Tensor) -> None:
        if self.mhc.backend == "auto" and not self._announced:
            self._announced = True
            _log_once(kernels.choose_backend(x, options=self._options), on_gpu=x.is_cuda)

    def _observe(self, mix: Mix) -> None:
        if self.observer is not None:
            self.observer(mix.res.detach())


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
