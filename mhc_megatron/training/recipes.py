"""Recipes: functions that return a TrainConfig. Copy one and change it; any field can also be
overridden on the command line with ``--set section.field=value``."""

import dataclasses
import difflib
import importlib

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.training.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)


def stdlib_small() -> TrainConfig:
    """A small mHC GPT on Python's standard library, TP=2 with SP: minutes on two CPU cores."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=352,
            seq_length=256,
        ),
        parallel=ParallelConfig(tensor=2, sequence=True),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20),
        steps=150,
        micro_batch_size=4,
        global_batch_size=8,
        eval_interval=25,
        save_interval=50,
        out="runs/stdlib-small",
    )


def stdlib_small_pp() -> TrainConfig:
    """``stdlib-small`` as two pipeline stages under 1F1B instead of TP=2."""
    return dataclasses.replace(
        stdlib_small(),
        parallel=ParallelConfig(pipeline=2),
        micro_batch_size=2,
        out="runs/stdlib-small-pp",
    )


def stdlib_small_dualpipe_v() -> TrainConfig:
    """``stdlib-small`` as four stages on two processes under DualPipeV instead of TP=2."""
    return dataclasses.replace(
        stdlib_small(),
        parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v"),
        micro_batch_size=1,
        out="runs/stdlib-small-dualpipe-v",
    )


def stdlib_deep() -> TrainConfig:
    """A deep, narrow model on one process: what ``compare`` uses to show gains over depth."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=12,
            hidden_size=64,
            num_attention_heads=2,
            ffn_hidden_size=176,
            seq_length=128,
        ),
        optimizer=OptimizerConfig(lr=6e-3, min_lr=6e-4, warmup_steps=10),
        steps=200,
        micro_batch_size=8,
        global_batch_size=8,
        eval_interval=20,
        eval_iters=4,
        out="runs/stdlib-deep",
    )


def gpt_100m() -> TrainConfig:
    """About 100M parameters in bf16 on one GPU."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=14,
            hidden_size=768,
            num_attention_heads=12,
            ffn_hidden_size=2048,
            seq_length=1024,
        ),
        mhc=MHCConfig(),
        parallel=ParallelConfig(distributed_optimizer=True),
        optimizer=OptimizerConfig(lr=6e-4, min_lr=6e-5, warmup_steps=30),
        dtype="bf16",
        steps=300,
        micro_batch_size=8,
        global_batch_size=16,
        eval_interval=50,
        eval_iters=4,
        out="runs/gpt-100m",
    )


RECIPES = {
    "stdlib-small": stdlib_small,
    "stdlib-small-pp": stdlib_small_pp,
    "stdlib-small-dualpipe-v": stdlib_small_dualpipe_v,
    "stdlib-deep": stdlib_deep,
    "gpt-100m": gpt_100m,
}


def load_recipe(name: str) -> TrainConfig:
    """The TrainConfig of a named recipe, or of the function ``package.module:function``.

    Raises:
        UserError: no such recipe, module or function, or it does not return a TrainConfig.
    """
    if ":" in name:
        module_name, _, function_name = name.partition(":")
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"recipe {name!r} cannot be loaded: {error}") from error
    elif name in RECIPES:
        function = RECIPES[name]
    else:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"unknown recipe {name!r}; {hint}recipes: {', '.join(RECIPES)}, or module:function"
        )
    config = function()
    if not isinstance(config, TrainConfig):
        raise UserError(f"recipe {name!r} returned {type(config).__name__}, not a TrainConfig")
    return config
