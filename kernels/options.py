"""The constants of a hyper-connection's coefficients, for functions that take all of them."""

from dataclasses import dataclass
from math import factorial

from mhc_megatron.kernels.projections import RESIDUAL_PROJECTIONS

# Of a branch's norm: the default of Megatron's layernorm_epsilon.
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class MappingOptions:
    """The constants of ``project`` and ``mappings``.

    Attributes:
        projection: one of ``RESIDUAL_PROJECTIONS``.
        iterations: of ``sinkhorn`` and ``sinkhorn_v4``, at least 1.
        eps: of ``sinkhorn_v4``.
        rms_eps: added to the mean square of the streams, inside the root.

    Raises:
        ValueError: the projection does not exist, or a number is out of range.
    """

    projection: str = "sinkhorn"
    iterations: int = 20
    eps: float = 1e-6
    rms_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.projection not in RESIDUAL_PROJECTIONS:
            raise ValueError(
                f"projection={self.projection!r} is not one of {', '.join(RESIDUAL_PROJECTIONS)}"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1")
        for name in ("eps", "rms_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    def num_logits(self, num_streams: int) -> int:
        """M, the rows of phi: pre, post and res logits."""
        num_res = {"identity": 0, "permutation": factorial(num_streams)}
        return 2 * num_streams + num_res.get(self.projection, num_streams**2)
