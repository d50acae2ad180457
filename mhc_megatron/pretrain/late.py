"""What ``pretrain`` wants before it has made the process groups that it is made of.

``megatron.training.pretrain`` takes a communicator and a collection of process groups, and makes
Megatron's groups itself, later. Both objects here find the groups when they are first needed.
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron.p2p import StreamP2PCommunicator, reject_mixed_up_messages


class LateProcessGroups(ProcessGroupCollection):
    """Megatron's own process groups. Until they exist, every group is None.

    One run's: after ``destroy_model_parallel`` it still holds the old ones.
    """

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not set yet.
        if not name.startswith("_") and parallel_state.model_parallel_is_initialized():
            found = vars(ProcessGroupCollection.use_mpu_process_groups())
            self.__dict__.update(found)
            if name in found:
                return found[name]
        return super().__getattr__(name)


class LateStreamP2PCommunicator(StreamP2PCommunicator):
    """``StreamP2PCommunicator`` over Megatron's pipeline group, built on first use.

    Args:
        config: the model's configuration, the object that the model will hold.
        hidden_parts: as for ``StreamP2PCommunicator``.

    Raises:
        UserError: as for ``StreamP2PCommunicator``, here already.
    """

    def __init__(self, config: TransformerConfig, *, hidden_parts: int) -> None:
        reject_mixed_up_messages(config, num_ranks=config.pipeline_model_parallel_size)
        self._arguments = (config, hidden_parts)

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not set yet: nothing is, until the other constructor has run.
        if name.startswith("__") or "pp_group" in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        config, hidden_parts = self._arguments
        super().__init__(
            parallel_state.get_pipeline_model_parallel_group(), config, hidden_parts=hidden_parts
        )
        return getattr(self, name)


def late_stream_p2p(config: TransformerConfig, mhc: MHCConfig) -> dict[str, Any]:
    """``pretrain``'s keyword arguments that make its pipeline carry n streams.

    Args:
        config: the model's configuration.
        mhc: the number of streams.

    Returns:
        ``p2p_communicator`` and ``pg_collection`` (Megatron wants both or neither).
    """
    return {
        "p2p_communicator": LateStreamP2PCommunicator(config, hidden_parts=mhc.hidden_parts),
        "pg_collection": LateProcessGroups(),
    }
