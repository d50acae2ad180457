"""Jobs for the worker pool: Megatron's own training loop, and ours beside it.

Imported where there is a ``megatron.training`` only inside the functions.
"""

import contextlib
import io
import os
import shlex
import time
from pathlib import Path
from unittest import mock

import torch

from mhc_megatron.errors import UserError
from mhc_megatron.gains import Gains, gain_magnitudes
from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.trainer import Trainer

# Megatron wants it under TP before it looks whether there is a GPU.
_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def arguments(config: TrainConfig, tensorboard: Path) -> list[str]:
    """Megatron's arguments for a run of ours, hyper-connections excepted."""
    model, layout, optimizer = config.model, config.parallel, config.optimizer
    text = f"""
        --num-layers {model.num_layers} --hidden-size {model.hidden_size}
        --num-attention-heads {model.num_attention_heads}
        --ffn-hidden-size {model.ffn_hidden_size} --norm-epsilon {model.norm_eps}
        --seq-length {model.seq_length} --max-position-embeddings {model.seq_length}
        --init-method-std {model.init_method_std} --normalization RMSNorm --disable-bias-linear
        --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
        --no-rope-fusion --no-persist-layer-norm --swiglu --no-bias-swiglu-fusion
        --position-embedding-type rope --untie-embeddings-and-output-weights
        --attention-softmax-in-fp32 --hidden-dropout 0 --attention-dropout 0
        --calculate-per-token-loss
        --micro-batch-size {config.micro_batch_size} --global-batch-size {config.global_batch_size}
        --train-iters {config.steps} --seed {config.seed}
        --tensor-model-parallel-size {layout.tensor} {"--sequence-parallel" * layout.sequence}
        --pipeline-model-parallel-size {layout.pipeline}
        {"--use-distributed-optimizer" * layout.distributed_optimizer}
        --lr {optimizer.lr} --min-lr {optimizer.min_lr} --lr-decay-style cosine
        --lr-warmup-iters {optimizer.warmup_steps} --clip-grad {optimizer.clip_grad}
        --weight-decay {optimizer.weight_decay} --adam-eps {optimizer.eps}
        --adam-beta1 {optimizer.beta1} --adam-beta2 {optimizer.beta2}
        --train-data-path {config.data.train} --valid-data-path {config.data.valid}
        --data-cache-path {tensorboard.parent / "cache"} --num-workers 0
        --no-create-attention-mask-in-dataloader
        --tokenizer-type NullTokenizer --vocab-size 384 --make-vocab-size-divisible-by 64
        --eval-iters {config.eval_iters} --eval-interval {10 * config.steps}
        --log-interval 1 --tensorboard-dir {tensorboard} {"--bf16" * (config.dtype == "bf16")}
    """
    if model.num_moe_experts is not None:
        text += f"""
            --num-experts {model.num_moe_experts} --moe-router-topk {model.moe_router_topk}
            --moe-ffn-hidden-size {model.moe_ffn_hidden_size} --moe-router-dtype fp32
            --moe-router-load-balancing-type aux_loss
            --moe-aux-loss-coeff {model.moe_aux_loss_coeff}
            --moe-token-dispatcher-type {model.moe_token_dispatcher}
            --expert-model-parallel-size {layout.expert}
        """
    return shlex.split(text)


def hyper_connection_flags(config: TrainConfig) -> list[str]:
    """The ``--mhc-*`` flags of a run."""
    from mhc_megatron.pretrain.options import mhc_options

    values = {**vars(config.parallel), **vars(config.mhc)}
    return [f"{o.flag}={values[o.name]}" for o in mhc_options() if o.name in values]


def run_loop(rank: int, world_size: int, argv: list[str]) -> None:
    """``mhc-megatron pretrain`` as one rank."""
    from mhc_megatron.pretrain.cli import train

    with mock.patch.dict(os.environ, _ENVIRONMENT):
        try:
            train(argv, World(rank=rank, local_rank=rank, world_size=world_size))
        except SystemExit as end:  # --exit-interval
            if end.code:
                raise


def logged_loop(rank: int, world_size: int, argv: list[str]) -> str:
    """``run_loop``, and what this rank printed."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        run_loop(rank, world_size, argv)
    return log.getvalue()


def refusals(rank: int, world_size: int, runs: list[list[str]]) -> list[str]:
    """What the user is told by each of the runs; "" for one that trains."""
    messages = []
    for argv in runs:
        try:
            run_loop(rank, world_size, argv)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def run_script(rank: int, world_size: int, argv: list[str], variables: dict[str, str]) -> None:
    """A user's own script: with the lines that docs/megatron.md adds, or untouched with --spec."""
    from mhc_megatron.pretrain.cli import for_this_machine, training_loop

    world = World(rank=rank, local_rank=rank, world_size=world_size)
    argv = for_this_machine(argv)
    with mock.patch.dict(os.environ, {**_ENVIRONMENT, **variables}), training_loop(world) as gpt:
        from megatron.core.enums import ModelType
        from megatron.training import argument_utils as utils
        from megatron.training import set_startup_timestamps

        from mhc_megatron.pretrain.script import add_mhc_args, hyper_connect, pretrain

        untouched = "--spec" in argv
        try:
            set_startup_timestamps(program_start=time.time())
            args = gpt.parsed_arguments(argv, None if untouched else add_mhc_args)
            model_config = utils.gpt_config_from_args(args)
            pretrain(
                utils.pretrain_cfg_container_from_args(args, model_config),
                gpt.build_datasets,
                ModelType.encoder_or_decoder,
                gpt.forward_step,
                **({} if untouched else hyper_connect(args, model_config)),
            )
        finally:
            gpt.leave()


def train_here(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[list[dict[str, float]], float, Gains]:
    """Our trainer: every step's numbers, the validation loss and the gains after the last."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        trainer = Trainer(config)
        steps = [trainer.step(step) for step in range(config.steps)]
        loss, mappings = trainer.evaluate()
        assert mappings is not None
        numbers = [{"loss": s.loss, "grad_norm": s.grad_norm, "lr": s.lr} for s in steps]
        return numbers, loss, gain_magnitudes(mappings.res)


def scalars(folder: Path) -> dict[str, list[float]]:
    """Every scalar in the order of steps, from the event files that Megatron wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def misplaced_states(rank: int, world_size: int, config: TrainConfig, order: str) -> list[str]:
    """Parameters for which the distributed optimizer saves another one's weights.

    ``order``: ``hook`` puts the float32 buffers first, as the plug-in does under Megatron's
    schedules; ``groups`` gives float32 parameters their own, as it does under others.
    """
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )

    from mhc_megatron.pretrain.buffers import float32_buffers_first
    from mhc_megatron.training.model import build_chunks, transformer_config, wrap_data_parallel
    from mhc_megatron.training.optimizer import float32_apart

    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        chunks = build_chunks(config, megatron_config, vocab_size=120)
        with torch.no_grad():
            for number, parameter in enumerate(p for c in chunks for p in c.parameters()):
                parameter.fill_(number)
        wrapped = wrap_data_parallel(config, megatron_config, chunks)
        if order == "hook":
            wrapped = float32_buffers_first(wrapped)
        options = OptimizerConfig(
            optimizer="adam", lr=1.0, bf16=True, use_distributed_optimizer=True
        )
        overrides = get_standard_config_overrides(options)
        if order == "groups":
            overrides |= float32_apart(1.0)
        optimizer = get_megatron_optimizer(options, wrapped, config_overrides=overrides)
        wrong = []
        for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
            for parameter, (group, place) in inner.model_param_group_index_map.items():
                held = inner.optimizer.param_groups[group]["params"][place]
                if held.numel() != parameter.numel() or held[0] != parameter.flatten()[0]:
                    wrong.append(str(tuple(parameter.shape)))
        return wrong
