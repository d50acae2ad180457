"""For a script that calls ``megatron.training.pretrain``: flags, and what they do to its model.

``add_mhc_args`` is the script's ``extra_args_provider``; what ``hyper_connect(args, model_config)``
returns are keywords for ``pretrain``. Megatron's own takes them, and under another
``--mhc-schedule`` the one here. docs/megatron.md shows them as a diff.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.compat import require_training_loop
from mhc_megatron.megatron.spec import gpt_block_spec
from mhc_megatron.pretrain.buffers import float32_buffers_first
from mhc_megatron.pretrain.gain_log import GainLog
from mhc_megatron.pretrain.late import late_stream_p2p
from mhc_megatron.pretrain.layout import layout_from_args
from mhc_megatron.pretrain.options import (
    add_mhc_args,
    log_timing_from_args,
    mhc_from_args,
    pipeline_from_args,
)
from mhc_megatron.pretrain.rejected import reject_arguments, reject_model
from mhc_megatron.pretrain.scheduled import run_schedule, scheduled_loop
from mhc_megatron.pretrain.timing_log import TimingLog

__all__ = ["add_mhc_args", "hyper_connect", "pretrain"]


def hyper_connect(args: Namespace, model_config: Any) -> dict[str, Any]:
    """Put hyper-connections into the model that Megatron is about to build.

    Called once, after the arguments are parsed with ``add_mhc_args`` and before ``pretrain``.

    Args:
        args: Megatron's, validated.
        model_config: the ``GPTModelConfig`` that goes into ``pretrain``'s container; its layer
            spec and its hooks are set.

    Returns:
        Keyword arguments for ``pretrain``: pipeline messages of n streams where the pipeline has
        more than one rank, and the logging of gain magnitudes. Under a ``--mhc-schedule`` of ours
        also ``forward_backward_func``, which only ``pretrain`` of this module takes.

    Raises:
        UserError: a ``--mhc-*`` value is not allowed, an argument of Megatron does not combine, the
            model is no GPTModel (HybridModel), or this megatron-core has no such training loop.
    """
    require_training_loop()
    mhc = mhc_from_args(args)
    reject_model(model_config)
    reject_arguments(args)
    if args.spec is not None:
        raise UserError(
            f"--spec {' '.join(args.spec)} and hyper_connect both choose the layers; leave out "
            "--spec"
        )
    layout = layout_from_args(args, pipeline_from_args(args), mhc)
    gain_log = GainLog()
    model_config.transformer_layer_spec = partial(block_spec, mhc=mhc)
    interval = log_timing_from_args(args)
    if interval:
        model_config.pre_wrap_hooks.append(TimingLog(interval).watch)
    model_config.pre_wrap_hooks.append(gain_log.watch)
    model_config.post_wrap_hooks.append(float32_buffers_first)
    keywords: dict[str, Any] = {
        "non_loss_data_func": gain_log.collect,
        "process_non_loss_data_func": gain_log.write,
    }
    if layout is not None:
        keywords["forward_backward_func"] = run_schedule(args, model_config, mhc, layout)
    elif args.pipeline_model_parallel_size > 1:
        keywords |= late_stream_p2p(model_config.transformer, mhc)
    return keywords


def pretrain(
    *arguments: Any,
    forward_backward_func: Callable[..., list[Any]] | None = None,
    **keywords: Any,
) -> None:
    """``megatron.training.pretrain``, on a schedule of the caller's if one is given.

    Args:
        arguments, keywords: Megatron's.
        forward_backward_func: from ``hyper_connect``; None leaves Megatron's schedule.

    Raises:
        UserError: the installed Megatron's loop cannot take another schedule.
    """
    import megatron.training

    loop = megatron.training
    if forward_backward_func is not None:
        loop = scheduled_loop(forward_backward_func)
    loop.pretrain(*arguments, **keywords)


def block_spec(
    model_config: Any,
    vp_stage: int | None = None,
    *,
    mhc: MHCConfig,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """``gpt_block_spec`` with the signature that ``GPTModelConfig.transformer_layer_spec`` has.

    Args:
        model_config: the ``GPTModelConfig``.
        vp_stage: the virtual stage that is built.
        mhc: the hyper-connections.
        pp_rank: the pipeline rank that is built for; None for this process's.
    """
    config = model_config.transformer
    return gpt_block_spec(
        config,
        mhc,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
