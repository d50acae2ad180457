"""Every difference between supported versions of megatron-core, and of torch, with its bounds."""

import contextlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Iterator

import megatron.core
import torch
import typing_extensions
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from packaging.version import Version
from torch import Tensor

from mhc_megatron.errors import UserError

OLDEST, NEWEST = Version("0.16"), Version("0.20")

# A setting of torch's allocator; 2.11 and 2.13 have it.
REUSE = "graph_capture_record_stream_reuse"


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


def require_training_loop() -> None:
    """Raise a UserError unless ``megatron.training`` is here, with the interface of 0.19.

    The wheels of core < 0.19 have no such package, and a Megatron-LM checkout of that age has
    another ``pretrain``: no config container, no ``p2p_communicator``.
    """
    version = core_version()
    if version < Version("0.19"):
        raise UserError(
            f"Megatron's own training loop needs megatron-core 0.19, this is {version}: its wheel "
            "has no megatron.training; install megatron-core>=0.19 (Python 3.12 or newer), or use "
            "mhc-megatron train"
        )
    if importlib.util.find_spec("megatron.training") is None:
        raise UserError(
            f"megatron-core {version} is here without megatron.training; install the wheel of "
            "megatron-core>=0.19, or put a Megatron-LM checkout of that release on PYTHONPATH"
        )


@contextlib.contextmanager
def typing_override() -> Iterator[None]:
    """``typing.override`` while ``megatron.training`` is imported.

    core >= 0.19 is published for Python >= 3.12, where it exists; its source also runs on 3.10.
    """
    if sys.version_info >= (3, 12) or hasattr(typing, "override"):
        yield
        return
    setattr(typing, "override", typing_extensions.override)  # noqa: B010
    try:
        yield
    finally:
        delattr(typing, "override")


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


def forget_moe_metrics() -> None:
    """Drop Megatron's table of losses by MoE layer, which has the size of the first model.

    It outlives ``destroy_model_parallel``; core 0.16 keeps it in ``moe_utils``, 0.19 in
    ``moe_logging``.
    """
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is None:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
        return
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()


def own_async_writer() -> dict[str, str]:
    """The keyword with which ``dist_checkpointing.save`` uses Megatron's own background writer.

    core 0.16 has no other; core 0.19 uses that of nvidia-resiliency-ext if it is not told.
    """
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        return {"async_strategy": "mcore"}
    return {}


def reuse_memory_of_lanes() -> None:
    """Let a graph use memory again that several streams have used.

    Else the allocator, which cannot ask a stream that is captured how far it is, keeps it to the
    end: an overlapped step needs what all its micro-batches pass from lane to lane at once. A torch
    that has no such setting keeps it. What the environment sets stays as it is.
    """
    set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    given = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    if set_allocator is None or REUSE in (given or ""):
        return
    try:
        set_allocator(",".join(filter(None, (given, f"{REUSE}:True"))))
    except (RuntimeError, ValueError):  # unknown to this torch
        if given:
            set_allocator(given)
