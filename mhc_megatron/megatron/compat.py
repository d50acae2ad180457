"""Every difference between the supported megatron-core versions, each with its bounds."""

import importlib.util

import megatron.core
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from packaging.version import Version
from torch import Tensor

from mhc_megatron.errors import UserError

OLDEST, NEWEST = Version("0.16"), Version("0.20")


def core_version() -> Version:
    """The release of the megatron-core that this process imports."""
    return Version(megatron.core.__version__)


def require_supported_core() -> None:
    """Raise a UserError unless megatron-core is one of the supported releases."""
    version = core_version()
    if not OLDEST <= version < NEWEST:
        raise UserError(
            f"megatron-core {version} is not supported; install megatron-core>=0.16,<0.20"
        )


def batch_on_this_cp_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's load-balanced slice of the sequences of ``batch`` [b, s]."""
    group = parallel_state.get_context_parallel_group()
    if core_version() < Version("0.18"):  # core < 0.18: no hybrid context parallelism to rule out
        return get_batch_on_this_cp_rank(batch, cp_group=group)
    # Without a group, core >= 0.18 slices over the whole world.
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def require_transformer_engine_where_core_does(config: TransformerConfig) -> None:
    """Raise a UserError for modules that this megatron-core cannot run without TE.

    core < 0.17 names Transformer Engine's functions in two places without importing or having
    them: MoE's ``router_gating_linear`` and the constructor of multi-latent attention.
    """
    if core_version() >= Version("0.17") or importlib.util.find_spec("transformer_engine"):
        return
    for needed, module in (
        (config.num_moe_experts is not None, "MoE layers"),
        (config.multi_latent_attention, "multi-latent attention"),
    ):
        if needed:
            raise UserError(
                f"{module} on megatron-core {core_version()} cannot run without Transformer "
                "Engine; install transformer-engine or megatron-core>=0.17"
            )
