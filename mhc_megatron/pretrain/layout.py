"""The layout that Megatron's arguments and ``--mhc-schedule`` ask for. Pure: no torch, no Megatron.

``ParallelConfig`` is the only place that knows what a schedule admits; its errors are respelled
into the flags that the user typed.
"""

from argparse import Namespace
from collections.abc import Mapping

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.pretrain.options import respelled
from mhc_megatron.refusals import refuse_first
from mhc_megatron.training.layout import ParallelConfig

_FLAGS = {
    "parallel.schedule": "--mhc-schedule",
    "parallel.overlap": "--mhc-overlap",
    "parallel.messages": "--mhc-messages",
    "parallel.pipeline": "--pipeline-model-parallel-size",
    "parallel.tensor": "--tensor-model-parallel-size",
    "parallel.first_stage_layers": "--decoder-first-pipeline-num-layers",
    "parallel.last_stage_layers": "--decoder-last-pipeline-num-layers",
    "model.num_layers": "--num-layers",
    "model.hidden_size": "--hidden-size",
    "model.mtp_num_layers": "--mtp-num-layers",
    "mhc.num_streams": "--mhc-num-streams",
    "mhc.recompute": "--mhc-recompute",
    "global_batch_size": "--global-batch-size",
    "micro_batch_size": "--micro-batch-size",
}


def layout_from_args(
    args: Namespace, pipeline: Mapping[str, str], mhc: MHCConfig
) -> ParallelConfig | None:
    """The layout under a schedule of ours, checked; None under Megatron's own.

    Args:
        args: Megatron's, validated.
        pipeline: ``schedule``, ``overlap`` and ``messages`` (``pipeline_from_args``).
        mhc: the hyper-connections.

    Raises:
        UserError: the schedule does not admit the layout, the model or the batch, or does not
            combine with one of Megatron's arguments; the message names the flags.
    """
    try:
        if pipeline["schedule"] == "megatron":
            ParallelConfig(**pipeline)  # type: ignore[arg-type]  # refuses the other two
            return None
        _reject_arguments(args, pipeline)
        layout = ParallelConfig(
            **pipeline,  # type: ignore[arg-type]
            tensor=args.tensor_model_parallel_size,
            pipeline=args.pipeline_model_parallel_size,
            context=args.context_parallel_size,
            data=args.data_parallel_size,
            first_stage_layers=args.decoder_first_pipeline_num_layers,
            last_stage_layers=args.decoder_last_pipeline_num_layers,
            sequence=args.sequence_parallel,
        )
        layout.check_layers(args.num_layers)
        layout.check_overlap(recompute="none", policy=mhc.recompute)
        layout.check_message_width(args.hidden_size * mhc.hidden_parts)
        layout.check_micro_batches(num_micro_batches(args))
        layout.check_prediction_layers(args.mtp_num_layers)
    except UserError as error:
        raise UserError(respelled(str(error), _FLAGS)) from None
    return layout


def num_micro_batches(args: Namespace) -> int:
    """Of a step, on every data-parallel rank."""
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def _reject_arguments(args: Namespace, pipeline: Mapping[str, str]) -> None:
    """Raise a UserError for the first of Megatron's arguments that the schedule cannot honour."""
    where = f"--mhc-schedule={pipeline['schedule']}"
    if pipeline["schedule"] == "dualpipe":
        raise UserError(
            f"{where}: its two copies of a stage are data-parallel replicas with the same data, "
            "which Megatron's loop does not give them; use dualpipe_v, or mhc-megatron train"
        )
    evaluated = (args.eval_global_batch_size, args.eval_micro_batch_size)
    trained = (args.global_batch_size, args.micro_batch_size)
    virtual = args.virtual_pipeline_model_parallel_size
    refusals = (
        (
            pipeline["schedule"] == "dualpipe_v" and args.pipeline_model_parallel_size == 1,
            "--pipeline-model-parallel-size=1",
            "Megatron's loop gives a rank two chunks in a pipeline only",
            "use mhc-megatron train, or --mhc-schedule=megatron",
        ),
        (
            virtual is not None,
            f"{virtual} virtual pipeline stages",
            "the schedule has its own number of stages per rank",
            "leave out --num-virtual-stages-per-pipeline-rank and "
            "--num-layers-per-virtual-pipeline-stage",
        ),
        (
            args.pipeline_model_parallel_layout is not None,
            "--pipeline-model-parallel-layout",
            "it numbers chunks in loops, not by the schedule's stages",
            "leave it out",
        ),
        (
            args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split,
            "--account-for-embedding-in-pipeline-split or --account-for-loss-in-pipeline-split",
            "they give pipeline ranks different numbers of layers, not stages",
            "use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
        ),
        (
            not args.untie_embeddings_and_output_weights,
            "tied embeddings",
            "Megatron adds up the two copies' gradients between the first and the last rank only",
            "add --untie-embeddings-and-output-weights",
        ),
        (
            args.overlap_grad_reduce or args.overlap_param_gather,
            "--overlap-grad-reduce or --overlap-param-gather",
            "gradients are reduced after the step",
            "leave them out",
        ),
        (
            args.variable_seq_lengths,
            "--variable-seq-lengths",
            "every message has one shape",
            "leave it out",
        ),
        (
            args.rampup_batch_size is not None or args.step_batch_size_schedule is not None,
            "a batch size that changes",
            "a schedule is made for one number of micro-batches",
            "leave out --rampup-batch-size and --step-batch-size-schedule",
        ),
        (
            evaluated != trained,
            f"--eval-global-batch-size={evaluated[0]} with --eval-micro-batch-size={evaluated[1]}",
            f"validation runs the schedule of the training step, {trained[0]} and {trained[1]}",
            "leave them out",
        ),
        (
            pipeline["overlap"] != "none" and args.recompute_granularity == "full",
            f"--mhc-overlap={pipeline['overlap']} with --recompute-granularity=full",
            "a checkpointed layer runs its whole backward at once",
            "leave it out, and use --mhc-recompute=auto",
        ),
    )
    refuse_first(where, refusals)
