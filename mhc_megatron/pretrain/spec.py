"""``--spec mhc_megatron.pretrain.spec gpt``: for a script that may not be touched.

The options are environment variables, named as the flags are: ``MHC_NUM_STREAMS=4``.
"""

from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import mhc_variables
from mhc_megatron.megatron.compat import require_training_loop
from mhc_megatron.megatron.p2p import reject_mixed_up_messages
from mhc_megatron.pretrain.buffers import float32_buffers_first
from mhc_megatron.pretrain.options import log_timing_from_environment, mhc_from_environment
from mhc_megatron.pretrain.rejected import reject_arguments, reject_model
from mhc_megatron.pretrain.script import block_spec
from mhc_megatron.pretrain.timing_log import TimingLog


def gpt(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The block spec of a GPTModel, called by Megatron's builder for every (virtual) stage.

    A spec cannot reach ``pretrain``'s arguments. Where the pipeline has more than one rank it turns
    on ``variable_seq_lengths``, with which the ranks send each other the shape before every
    message; and gain magnitudes are not logged.

    Args:
        model_config: the ``GPTModelConfig``.
        vp_stage: the virtual stage that is built.

    Raises:
        UserError: a ``MHC_*`` variable is unknown or its value not allowed, or an argument of
            Megatron does not combine.
    """
    require_training_loop()
    from megatron.training import get_args

    mhc = mhc_from_environment(mhc_variables())
    reject_model(model_config)
    reject_arguments(get_args())
    config = model_config.transformer
    if config.pipeline_model_parallel_size > 1:
        reject_mixed_up_messages(config, num_ranks=config.pipeline_model_parallel_size)
        if config.num_moe_experts is not None and config.moe_token_dispatcher_type == "allgather":
            raise UserError(
                "--moe-token-dispatcher-type=allgather needs one shape for all pipeline messages, "
                "which --spec alone cannot announce; use alltoall, or hyper_connect in the script"
            )
        config.variable_seq_lengths = True
    if float32_buffers_first not in model_config.post_wrap_hooks:  # not for every virtual stage
        model_config.post_wrap_hooks.append(float32_buffers_first)
        interval = log_timing_from_environment(mhc_variables())
        if interval:
            model_config.pre_wrap_hooks.append(TimingLog(interval).watch)
    return block_spec(model_config, vp_stage, mhc=mhc)
