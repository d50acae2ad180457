"""The operations of hyper-connections on [..., n, C] streams; docs/math.md states each of them."""

from mhc_megatron.kernels.projections import (
    RESIDUAL_PROJECTIONS,
    permutation,
    residual_mapping,
    sinkhorn,
    sinkhorn_v4,
)
from mhc_megatron.kernels.reference import (
    Mappings,
    contract_learned,
    contract_mean,
    contract_sum,
    expand,
    mappings,
    post_mix,
    pre_mix,
    project,
)

__all__ = [
    "RESIDUAL_PROJECTIONS",
    "Mappings",
    "contract_learned",
    "contract_mean",
    "contract_sum",
    "expand",
    "mappings",
    "permutation",
    "post_mix",
    "pre_mix",
    "project",
    "residual_mapping",
    "sinkhorn",
    "sinkhorn_v4",
]
