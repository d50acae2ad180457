"""Configuration of the hyper-connections: a frozen dataclass and its checks, without torch."""

from dataclasses import dataclass
from math import factorial
from typing import Literal, get_args

from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.blocks import PolicyName, RecomputePolicy
from mhc_megatron.pipeline.errors import ScheduleError

Projection = Literal["sinkhorn", "sinkhorn_v4", "permutation", "identity", "unconstrained"]
Variant = Literal["two_pass", "single_pass"]
Contraction = Literal["mean", "sum", "learned", "read"]
Backend = Literal["auto", "triton", "native", "reference"]

# mHC-lite mixes all n! permutation matrices, so its projection grows with n!.
MAX_PERMUTATION_STREAMS = 4


@dataclass(frozen=True, kw_only=True)
class MHCConfig:
    """Hyper-connections around every residual branch of a transformer.

    Attributes:
        num_streams: n, the number of parallel residual streams.
        variant: which state gives a branch's read weights H_pre: ``two_pass`` the state it reads
            (mHC paper, Eq. 3), ``single_pass`` the state before it (DeepSeek-V4.1), so that
            writing the streams and reading them again are one pass over them.
        projection: how the residual mapping H_res is kept on its manifold:
            ``sinkhorn`` (mHC paper, Eq. 9), ``sinkhorn_v4`` (DeepSeek-V4's eps floor),
            ``permutation`` (mHC-lite, a convex mix of all n! permutations), ``identity``
            (H_res = I), ``unconstrained`` (plain hyper-connections, the paper's control).
        sinkhorn_iterations: t_max, row/column normalisations per token (paper: 20).
        init_gate: initial value of the three gating factors alpha (paper: 0.01).
        rms_eps: added inside the square root of the RMS of the n*C vector. The paper trains
            with 1e-20; the default keeps the gradient of an all-zero (padding) token finite.
        sinkhorn_eps: the floor of ``sinkhorn_v4`` (DeepSeek-V4's ``hc_eps``); no other
            projection has one.
        contraction: how the streams become one before the final norm: ``mean``, ``sum``,
            ``learned`` (DeepSeek-V4's sigmoid head), or, with ``single_pass``, ``read``: the
            last sublayer's H_pre, which has no other reader (DeepSeek-V4.1).
        backend: ``triton`` runs the fused kernels and raises where they cannot run, ``native``
            raises also where they are not launched by the extension (docs/install.md),
            ``reference`` is plain torch; ``auto`` takes what can run, in this order of speed:
            ``native``, ``triton``, ``reference``, and logs what it took.
        recompute: which sublayers' states are dropped after the forward and rebuilt before the
            backward, as ``RecomputePolicy`` says. Gradients are the same bits. The reference
            keeps float32 copies of half-precision streams that no policy drops.
        recompute_block: sublayers of a block of ``recompute="block"``, and of no other policy.

    Raises:
        UserError: a value is out of range; the message names it.
    """

    num_streams: int = 4
    variant: Variant = "two_pass"
    projection: Projection = "sinkhorn"
    sinkhorn_iterations: int = 20
    init_gate: float = 0.01
    rms_eps: float = 1e-6
    sinkhorn_eps: float = 1e-6
    contraction: Contraction = "mean"
    backend: Backend = "auto"
    recompute: PolicyName = "none"
    recompute_block: int | None = None

    def __post_init__(self) -> None:
        if self.num_streams < 1:
            raise UserError(f"num_streams={self.num_streams} must be at least 1 (the paper uses 4)")
        for name, allowed in (
            ("variant", get_args(Variant)),
            ("projection", get_args(Projection)),
            ("contraction", get_args(Contraction)),
            ("backend", get_args(Backend)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.sinkhorn_iterations < 1:
            raise UserError(
                f"sinkhorn_iterations={self.sinkhorn_iterations} must be at least 1 "
                "(the paper uses 20)"
            )
        if self.projection == "permutation" and self.num_streams > MAX_PERMUTATION_STREAMS:
            raise UserError(
                f"projection='permutation' with num_streams={self.num_streams} would mix "
                f"{factorial(self.num_streams)} permutations; use at most "
                f"{MAX_PERMUTATION_STREAMS} streams, or projection='sinkhorn'"
            )
        for name in ("rms_eps", "sinkhorn_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        _ = self.recompute_policy
        if self.contraction == "read" and self.variant != "single_pass":
            raise UserError(
                f"contraction='read' with variant={self.variant!r} has nothing to read with: every "
                "H_pre is used by its own sublayer; use variant='single_pass', or "
                "contraction='mean'"
            )
        if self.recompute != "none" and self.variant == "single_pass":
            raise UserError(
                f"recompute={self.recompute!r} with variant='single_pass' would rebuild a branch's "
                "input with the H_pre of its own sublayer, which did not read it; use "
                "recompute='none' (Megatron's full recompute of layers works), or "
                "variant='two_pass'"
            )

    @property
    def requires_kernels(self) -> bool:
        """Whether nothing else may run in the kernels' place."""
        return self.backend in ("triton", "native")

    @property
    def recompute_policy(self) -> RecomputePolicy:
        """``recompute`` and ``recompute_block`` as one value."""
        try:
            return RecomputePolicy(name=self.recompute, block=self.recompute_block)
        except ScheduleError as error:
            raise UserError(str(error)) from None

    def block_of(self, num_sublayers: int) -> int:
        """Sublayers of a recompute block in a stage of ``num_sublayers``; 0 with ``none``.

        Raises:
            UserError: the stage is shorter than the block.
        """
        try:
            return self.recompute_policy.block_of(
                num_sublayers=num_sublayers, num_streams=self.num_streams
            )
        except ScheduleError as error:
            raise UserError(str(error)) from None

    def reject_recompute_of_layers(self, option: str, remedy: str) -> None:
        """Raise a UserError if the streams are recomputed beside Megatron's recompute of layers.

        Args:
            option: that asks for whole layers, with its value.
            remedy: in the terms of whoever set it.
        """
        if self.recompute != "none":
            raise UserError(
                f"{option} does not combine with recompute={self.recompute!r} of the "
                "hyper-connections: it re-runs whole layers, hyper-connections included; "
                f"{remedy}"
            )

    @property
    def hidden_parts(self) -> int:
        """C-wide parts of the hidden states between pipeline stages: the n streams, and under
        ``single_pass`` the next branch's input beside them."""
        return self.num_streams + (self.variant == "single_pass")

    @property
    def num_res_logits(self) -> int:
        """Projected numbers per token that make H_res: n^2, n! or none."""
        n = self.num_streams
        return {"permutation": factorial(n), "identity": 0}.get(self.projection, n * n)

    @property
    def num_logits(self) -> int:
        """Projected numbers per token: pre (n), post (n), res, packed in that order."""
        return 2 * self.num_streams + self.num_res_logits
