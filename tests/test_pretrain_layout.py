"""``--mhc-schedule`` beside Megatron's arguments: the layout, and what is refused by flag."""

from argparse import Namespace
from typing import Any

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.pretrain.layout import layout_from_args
from mhc_megatron.training.layout import ParallelConfig

_ARGS: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 4,
    "context_parallel_size": 1,
    "data_parallel_size": 2,
    "sequence_parallel": False,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "untie_embeddings_and_output_weights": True,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "variable_seq_lengths": False,
    "rampup_batch_size": None,
    "step_batch_size_schedule": None,
    "global_batch_size": 32,
    "micro_batch_size": 2,
    "eval_global_batch_size": 32,
    "eval_micro_batch_size": 2,
    "recompute_granularity": None,
    "num_layers": 16,
    "hidden_size": 64,
    "mtp_num_layers": None,
}


def _layout(
    schedule: str,
    *,
    overlap: str = "none",
    messages: str = "model",
    mhc: MHCConfig = MHCConfig(),  # noqa: B008 (frozen)
    **changed: Any,
) -> ParallelConfig | None:
    pipeline = {"schedule": schedule, "overlap": overlap, "messages": messages}
    return layout_from_args(Namespace(**{**_ARGS, **changed}), pipeline, mhc)


def test_the_layout_is_that_of_megatrons_arguments() -> None:
    assert _layout("megatron") is None
    found = _layout(
        "dualpipe_v", overlap="post", messages="fp8", decoder_first_pipeline_num_layers=2
    )
    assert found == ParallelConfig(
        pipeline=4, data=2, schedule="dualpipe_v", overlap="post", messages="fp8",
        first_stage_layers=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "changed", "message"),
    [
        (
            "dualpipe",
            {},
            "--mhc-schedule=dualpipe: its two copies of a stage are data-parallel replicas with "
            "the same data, which Megatron's loop does not give them; use dualpipe_v, or "
            "mhc-megatron train",
        ),
        (
            "zb_h2",
            {},
            "--mhc-schedule='zb_h2' is not one of megatron, gpipe, one_f_one_b, zb_h1, "
            "dualpipe_v, dualpipe",
        ),
        (
            "zb_h1",
            {"pipeline_model_parallel_size": 1},
            "--mhc-schedule='zb_h1' needs --pipeline-model-parallel-size > 1; set "
            "--mhc-schedule=megatron",
        ),
        (
            "dualpipe_v",
            {"pipeline_model_parallel_size": 1},
            "--pipeline-model-parallel-size=1 does not combine with --mhc-schedule=dualpipe_v: "
            "Megatron's loop gives a rank two chunks in a pipeline only; use mhc-megatron train, "
            "or --mhc-schedule=megatron",
        ),
        (
            "dualpipe_v",
            {"num_layers": 12},
            "--num-layers=12 is not divisible by --pipeline-model-parallel-size * 2 (dualpipe_v) "
            "= 8; change it, or set --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers",
        ),
        (
            "dualpipe_v",
            {"global_batch_size": 28, "eval_global_batch_size": 28},
            "7 micro-batches per step are below 2 * --pipeline-model-parallel-size = 8, which "
            "dualpipe_v needs; raise --global-batch-size, lower --micro-batch-size, or use "
            "--mhc-schedule=zb_h1",
        ),
        (
            "dualpipe_v",
            {"mtp_num_layers": 1},
            "--mtp-num-layers=1 under dualpipe_v: Megatron builds these layers, and adds up their "
            "embedding's gradient, on the last pipeline rank, but the last stage is on the first; "
            "use another --mhc-schedule",
        ),
        (
            "zb_h1",
            {"virtual_pipeline_model_parallel_size": 2},
            "2 virtual pipeline stages does not combine with --mhc-schedule=zb_h1: the schedule "
            "has its own number of stages per rank; leave out "
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage",
        ),
        (
            "zb_h1",
            {"overlap": "post"},
            "--mhc-overlap='post' with --mhc-schedule='zb_h1', which pairs no forward with a "
            "backward; use dualpipe_v or dualpipe, or --mhc-overlap='none'",
        ),
        (
            "dualpipe_v",
            {"overlap": "all"},
            "--mhc-overlap='all' with --mhc-recompute='none' has no rebuild to run ahead; use "
            "--mhc-overlap='post', or --mhc-recompute='auto'",
        ),
        (
            "dualpipe_v",
            {"overlap": "post", "recompute_granularity": "full"},
            "--mhc-overlap=post with --recompute-granularity=full does not combine with "
            "--mhc-schedule=dualpipe_v: a checkpointed layer runs its whole backward at once; "
            "leave it out, and use --mhc-recompute=auto",
        ),
        (
            "megatron",
            {"messages": "fp8"},
            "--mhc-messages='fp8' with --mhc-schedule='megatron', whose messages are Megatron's "
            "own; use another --mhc-schedule, or --mhc-messages='model'",
        ),
        (
            "megatron",
            {"overlap": "post"},
            "--mhc-overlap='post' with --mhc-schedule='megatron', which pairs no forward with a "
            "backward; use dualpipe_v or dualpipe, or --mhc-overlap='none'",
        ),
        (
            "zb_h1",
            {"messages": "fp8", "hidden_size": 40},
            "--mhc-messages='fp8' rounds blocks of 128 numbers, and a token has 160 in a message; "
            "change --hidden-size or --mhc-num-streams, or use --mhc-messages='model'",
        ),
    ],
)
def test_what_the_schedule_does_not_admit_names_the_flags(
    schedule: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        _layout(schedule, **changed)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"pipeline_model_parallel_layout": "x"}, "--pipeline-model-parallel-layout"),
        (
            {"account_for_loss_in_pipeline_split": True},
            "--account-for-embedding-in-pipeline-split or --account-for-loss-in-pipeline-split",
        ),
        ({"untie_embeddings_and_output_weights": False}, "tied embeddings"),
        ({"overlap_grad_reduce": True}, "--overlap-grad-reduce or --overlap-param-gather"),
        ({"variable_seq_lengths": True}, "--variable-seq-lengths"),
        ({"rampup_batch_size": [1, 1, 1]}, "a batch size that changes"),
        (
            {"eval_micro_batch_size": 1},
            "--eval-global-batch-size=32 with --eval-micro-batch-size=1",
        ),
    ],
)
def test_arguments_that_the_schedule_cannot_honour(changed: dict[str, Any], option: str) -> None:
    _layout("zb_h1")
    with pytest.raises(UserError) as refused:
        _layout("zb_h1", **changed)
    start = f"{option} does not combine with --mhc-schedule=zb_h1: "
    reason, _, remedy = str(refused.value).removeprefix(start).rpartition("; ")
    assert str(refused.value).startswith(start) and reason and remedy
