"""The operations of hyper-connections on [..., n, C] streams; docs/math.md states each of them."""

from mhc_megatron.kernels.backends import BackendChoice, choose_backend
from mhc_megatron.kernels.checks import finite_inputs
from mhc_megatron.kernels.compositions import Gates
from mhc_megatron.kernels.functional import post, post_pre, pre, single_pass
from mhc_megatron.kernels.head import contract_learned, contract_mean, contract_sum, expand
from mhc_megatron.kernels.options import MappingOptions
from mhc_megatron.kernels.packed import PackedMappings
from mhc_megatron.kernels.projections import (
    RESIDUAL_PROJECTIONS,
    permutation,
    residual_mapping,
    sinkhorn,
    sinkhorn_v4,
)
from mhc_megatron.kernels.recompute import Rebuilt, rebuild
from mhc_megatron.kernels.reference import (
    Mappings,
    mappings,
    post_mix,
    pre_mix,
    project,
    rms_norm,
)

__all__ = [
    "RESIDUAL_PROJECTIONS",
    "BackendChoice",
    "Gates",
    "MappingOptions",
    "Mappings",
    "PackedMappings",
    "Rebuilt",
    "choose_backend",
    "contract_learned",
    "contract_mean",
    "contract_sum",
    "expand",
    "finite_inputs",
    "mappings",
    "permutation",
    "post",
    "post_mix",
    "post_pre",
    "pre",
    "pre_mix",
    "project",
    "rebuild",
    "residual_mapping",
    "rms_norm",
    "single_pass",
    "sinkhorn",
    "sinkhorn_v4",
]
