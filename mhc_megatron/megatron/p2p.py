"""Megatron's pipeline schedules with messages of [s, b, n*C]."""

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError


def reject_mixed_up_messages(config: TransformerConfig, *, num_ranks: int) -> None:
    """Raise a UserError where both neighbours are one rank and messages have no order.

    Args:
        config: the model's configuration.
        num_ranks: of the pipeline.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    if num_ranks == 2 and virtual is not None and virtual > 1 and config.batch_p2p_comm:
        raise UserError(
            "pipeline_model_parallel_size=2 with virtual_pipeline_model_parallel_size="
            f"{virtual} and batch_p2p_comm=True mixes up messages: both neighbours are the "
            "same rank; set batch_p2p_comm=False (overlap_p2p_comm=True), use more than 2 "
            "pipeline ranks, or no virtual stages"
        )


class StreamP2PCommunicator(P2PCommunicator):
    """Point-to-point communication of n-stream hidden states between pipeline stages.

    Megatron's schedules announce ``[s, b, C]``; every hop of an mHC model carries n times that,
    and of a single-pass one n + 1 times.

    Args:
        pp_group: the pipeline process group.
        config: the model's configuration.
        hidden_parts: n, or n + 1 (``MHCConfig.hidden_parts``).

    Raises:
        UserError: two pipeline ranks with virtual stages and batched p2p, where both neighbours
            are one peer and messages of opposite direction are mixed up without an error.
    """

    def __init__(
        self,
        pp_group: torch.distributed.ProcessGroup,
        config: TransformerConfig,
        *,
        hidden_parts: int,
    ) -> None:
        reject_mixed_up_messages(config, num_ranks=pp_group.size())
        super().__init__(pp_group, config)
        self.hidden_parts = hidden_parts

    def _communicate(self, *, tensor_shape: Any, **kwargs: Any) -> Any:
        # With variable sequence lengths the stages exchange real shapes, and this one is unused.
        if tensor_shape is not None and len(tensor_shape) == 3:
            seq, batch, hidden = tensor_shape
            tensor_shape = (seq, batch, hidden * self.hidden_parts)
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)


def stream_p2p(
    config: TransformerConfig,
    mhc: MHCConfig,
    pg_collection: ProcessGroupCollection | None = None,
) -> dict[str, Any]:
    """Keyword arguments that make a stock schedule carry n streams.

    Usage: ``get_forward_backward_func()(..., **stream_p2p(config, mhc))``.

    Args:
        config: the model's configuration.
        mhc: the number of streams.
        pg_collection: process groups; Megatron's global ones by default.

    Returns:
        ``p2p_communicator`` and ``pg_collection`` (Megatron wants both or neither).
    """
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    communicator = StreamP2PCommunicator(pg_collection.pp, config, hidden_parts=mhc.hidden_parts)
    return {"p2p_communicator": communicator, "pg_collection": pg_collection}
