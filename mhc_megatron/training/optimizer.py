"""Megatron's mixed-precision AdamW over the model chunks."""

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import DTYPES
from mhc_megatron.training.schedule import learning_rate

_NOMINAL_LR = 1.0


def build_optimizer(config: TrainConfig, chunks: list[torch.nn.Module]) -> Any:
    """Megatron's optimizer for DDP-wrapped chunks.

    Weight decay skips every one-dimensional parameter (Megatron's own rule), which exempts the
    hyper-connections' biases and alphas and decays their projection, as DeepSeek-V4 does.
    """
    options = config.optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        # Megatron finds a checkpoint's parameter groups by these two (core >= 0.17), and a
        # resumed run may change its rates; update_groups sets the real one every step.
        lr=_NOMINAL_LR,
        min_lr=0.0,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=options.clip_grad,
        bf16=config.dtype == "bf16",
        fp16=config.dtype == "fp16",
        params_dtype=DTYPES[config.dtype],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return get_megatron_optimizer(
        megatron_config, chunks, config_overrides=_group_overrides(config, megatron_config)
    )


def _group_overrides(
    config: TrainConfig, megatron_config: MegatronOptimizerConfig
) -> dict[ParamKey, Any]:
    """Megatron's own groups, and the float32 parameters of a half-precision model apart."""
    overrides = get_standard_config_overrides(megatron_config)
    return overrides if config.dtype == "fp32" else overrides | float32_apart(_NOMINAL_LR)


def float32_apart(lr: float) -> dict[ParamKey, Any]:
    """An override that gives float32 parameters groups of their own, with the rate of all.

    The distributed optimizer (core 0.16 to 0.19) lists a group's float32 parameters before the
    others but numbers them in the buffers' order, so a checkpoint of a group with both dtypes
    takes one parameter's state for another's. An override that changes nothing makes a group.

    Args:
        lr: ``OptimizerConfig.lr``.
    """
    is_float32 = ParamPredicate(name="float32", fn=lambda p: p.dtype == torch.float32)
    return {ParamKey(predicate=is_float32): ParamGroupOverride(max_lr=lr)}


def update_groups(config: TrainConfig, optimizer: Any, step: int) -> float:
    """Set this step's learning rate, and the settings that a checkpoint may have brought back.

    Returns:
        The learning rate.
    """
    options = config.optimizer
    lr = learning_rate(options, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (options.beta1, options.beta2)
        group["eps"] = options.eps
    return lr
