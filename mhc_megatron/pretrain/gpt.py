"""The script that ``mhc-megatron pretrain`` runs: data and loss of a GPT for Megatron's loop."""

import dataclasses
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_tokenizer,
    set_startup_timestamps,
)
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import destroy_global_state
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.compat import batch_on_this_cp_rank
from mhc_megatron.pretrain.script import add_mhc_args, hyper_connect, pretrain
from mhc_megatron.training.runtime import set_seed
from mhc_megatron.training.step import masked_loss

# Fields of GPTDatasetConfig whose argument has another name; all others have the same.
_DATA_ARGUMENTS = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}
# What Megatron-LM's own script does with the data or the loss, and this one does not.
_NOT_HERE = (
    "sft",
    "fim_data",
    "per_dataset_sequences_path",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "check_for_spiky_loss",
    "logits_load_dir",
    "perform_rl_step",
)


def run(argv: Sequence[str], world: World | None) -> None:
    """Train as one process of the run, to the end or to Megatron's exit conditions.

    Args:
        argv: Megatron's arguments and the ``--mhc-*`` flags.
        world: this process among the run's; None if it is the only one.

    Raises:
        UserError: something does not combine; before the first step.
        SystemExit: an exit condition of Megatron (``--exit-interval`` and others).
    """
    store = torch.distributed.HashStore() if world is None else None
    try:
        # All ranks or none: Megatron compares the times of those that have one.
        set_startup_timestamps(program_start=time.time())
        args = parsed_arguments(argv, add_mhc_args)
        for name in _NOT_HERE:
            if getattr(args, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is done by Megatron-LM's pretrain_gpt.py and not "
                    "by mhc-megatron pretrain; add hyper_connect to that script (docs/megatron.md)"
                )
        model_config = gpt_config_from_args(args)
        keywords = hyper_connect(args, model_config)
        if "forward_backward_func" not in keywords:  # its stages have seeds of their own
            model_config.transformer_layer_spec = partial(
                _seeded_block_spec, model_config.transformer_layer_spec, args.seed
            )
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            build_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
            get_embedding_ranks=partial(_embedding_ranks, args, model_config.transformer),
            **keywords,
        )
    finally:
        leave()


def parsed_arguments(
    argv: Sequence[str],
    extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
) -> Namespace:
    """Megatron's arguments, validated; Megatron parses ``sys.argv`` and nothing else.

    Args:
        argv: without the program's name.
        extra_args_provider: adds flags that are not Megatron's.
    """
    before = sys.argv
    sys.argv = ["mhc-megatron pretrain", *argv]
    try:
        return parse_and_validate_args(extra_args_provider=extra_args_provider)
    finally:
        sys.argv = before


def leave() -> None:
    """Undo what Megatron leaves behind: its global state, and unwritten TensorBoard scalars."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.close()
    destroy_global_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """The dataset's configuration from Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    names = [field.name for field in dataclasses.fields(GPTDatasetConfig) if field.init]
    given = {name: _DATA_ARGUMENTS.get(name, name) for name in names}
    values = {name: getattr(args, given[name]) for name in names if hasattr(args, given[name])}
    return GPTDatasetConfig(
        **{
            **values,
            "blend": blend,
            "blend_per_split": blend_per_split,
            "tokenizer": get_tokenizer(),
            "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        }
    )


def build_datasets(num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
    """Train, validation and test data on every rank: ``pretrain``'s dataset provider.

    Args:
        num_samples: of the three splits, at least.
        vp_stage: all virtual stages read the same.
    """
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, dataset_config(args))
    return builder.build()


# Tells Megatron that the builder itself knows on which ranks it builds.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(data: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """One micro-batch through one model chunk: ``pretrain``'s ``forward_step_func``."""
    keys = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    found = next(data)
    batch = {key: found[key].cuda(non_blocking=True) for key in keys if key in found}
    batch = batch_on_this_cp_rank(batch)
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(_loss, batch["loss_mask"])


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, num_tokens, report = masked_loss(loss_mask, losses)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, rejected in (("NaN", torch.isnan), ("infinity", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=total,
                rejection_func=rejected,
                message=f"{name} in the loss of a micro-batch",
                tolerance=0.0,
                fatal=True,
            )
    return total, num_tokens, {"lm loss": report["lm"]}


def _seeded_block_spec(
    block_spec: Callable[..., Any], seed: int, model_config: Any, vp_stage: int | None = None
) -> Any:
    """``block_spec``, called before any weight is drawn; on the CPU, the seed anew before it.

    Megatron tries its compiled functions, dropout included, between seeding and building. On a GPU
    they draw from another generator than the weights, on the CPU there is one.
    """
    if not torch.cuda.is_available() and not vp_stage:
        set_seed(seed)
    return block_spec(model_config, vp_stage)


def _embedding_ranks(args: Namespace, config: Any, pipeline: list[int]) -> list[int]:
    """Ranks that hold a word embedding: the first, and those that share or predict with it."""
    ranks = {pipeline[0], *get_mtp_ranks(pipeline, config)}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pipeline[-1])
    return sorted(ranks)
