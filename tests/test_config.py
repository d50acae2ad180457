"""Bad configurations: one line that names the field, the value and the remedy."""

import dataclasses
from typing import Any

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.training.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from mhc_megatron.training.recipes import RECIPES, load_recipe
from mhc_megatron.training.schedule import learning_rate

FP8 = ParallelConfig(pipeline=2, schedule="zb_h1", messages="fp8")
OVERLAPPED = ParallelConfig(pipeline=2, schedule="dualpipe_v", overlap="all")
FLEX = ModelConfig(num_moe_experts=4, moe_token_dispatcher="flex")
ON_GPUS: dict[str, Any] = {
    "dtype": "bf16",
    "parallel": ParallelConfig(data=2, expert=2, distributed_optimizer=True),
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MHCConfig(num_streams=0), "num_streams=0 must be at least 1"),
        (
            lambda: MHCConfig(recompute="block", recompute_block=1.5),  # type: ignore[arg-type]
            "recompute_block=1.5 is not a whole number of sublayers",
        ),
        (
            lambda: TrainConfig(recompute="full", mhc=MHCConfig(recompute="auto")),
            "recompute='full' does not combine with recompute='auto' of the hyper-connections: it "
            "re-runs whole layers, hyper-connections included; set mhc.recompute='none', or "
            "recompute='core_attn'",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(num_layers=4),
                mhc=MHCConfig(recompute="block", recompute_block=4),
                parallel=ParallelConfig(pipeline=2, first_stage_layers=3),
            ),
            "recompute_block=4 is above the 2 sublayers of a stage; blocks end with the stage",
        ),
        (lambda: MHCConfig(projection="x"), "projection='x' is not one of sinkhorn"),
        (lambda: MHCConfig(contraction="x"), "contraction='x' is not one of mean"),
        (
            lambda: ParallelConfig(pipeline=2, schedule="dualpipe_v", overlap="x"),
            "parallel.overlap='x' is not one of none, post, recompute, all",
        ),
        (
            lambda: ParallelConfig(pipeline=2, schedule="zb_h1", overlap="post"),
            "parallel.schedule='zb_h1', which pairs no forward with a backward; use dualpipe_v",
        ),
        (
            lambda: TrainConfig(model=ModelConfig(residual="plain"), parallel=OVERLAPPED),
            "model.residual='plain' has none; set parallel.overlap='none'",
        ),
        (
            lambda: TrainConfig(recompute="full", parallel=OVERLAPPED),
            "parallel.overlap='all' with recompute='full': .* use recompute='none'",
        ),
        (
            lambda: TrainConfig(parallel=OVERLAPPED),
            "parallel.overlap='all' with mhc.recompute='none' has no rebuild to run ahead",
        ),
        (
            lambda: ParallelConfig(messages="fp16"),
            "parallel.messages='fp16' is not one of model, fp8",
        ),
        (
            lambda: ParallelConfig(pipeline=2, messages="fp8"),
            "parallel.schedule='megatron', whose messages are Megatron's own; use another",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(hidden_size=48), mhc=MHCConfig(num_streams=4), parallel=FP8
            ),
            "rounds blocks of 128 numbers, and a token has 192 in a message; change model.hidden",
        ),
        (
            lambda: TrainConfig(model=ModelConfig(hidden_size=64, residual="plain"), parallel=FP8),
            "and a token has 64 in a message; .* or use parallel.messages='model'",
        ),
        (lambda: MHCConfig(variant="x"), "variant='x' is not one of two_pass, single_pass"),
        (
            lambda: MHCConfig(contraction="read"),
            "contraction='read' with variant='two_pass' .* use variant='single_pass', or",
        ),
        (
            lambda: MHCConfig(variant="single_pass", recompute="auto"),
            "recompute='auto' with variant='single_pass' .* use recompute='none'",
        ),
        (lambda: MHCConfig(sinkhorn_iterations=0), "sinkhorn_iterations=0"),
        (lambda: MHCConfig(rms_eps=0.0), "rms_eps=0.0 must be positive"),
        (lambda: MHCConfig(rms_eps=float("nan")), "rms_eps=nan must be positive"),
        (
            lambda: MHCConfig(projection="permutation", num_streams=8),
            "would mix 40320 permutations; use at most 4 streams",
        ),
        (
            lambda: ModelConfig(hidden_size=130),
            "model.hidden_size=130 is not divisible by model.num_attention_heads=4",
        ),
        (lambda: ModelConfig(num_layers=0), "model.num_layers=0 must be at least 1"),
        (lambda: ModelConfig(num_query_groups=3), "model.num_query_groups=3 does not divide"),
        (
            lambda: ModelConfig(num_moe_experts=2, moe_router_topk=4),
            "model.moe_router_topk=4 exceeds model.num_moe_experts=2",
        ),
        (lambda: ParallelConfig(sequence=True), "needs parallel.tensor > 1"),
        (lambda: ParallelConfig(virtual=2), "parallel.virtual=2 needs parallel.pipeline > 1"),
        (
            lambda: ParallelConfig(expert=2, data=3),
            "parallel.expert=2 does not divide parallel.data .* = 3",
        ),
        (lambda: OptimizerConfig(lr=0.0), "optimizer.lr=0.0 must be positive"),
        (lambda: OptimizerConfig(lr=1.0, min_lr=2.0), "optimizer.min_lr=2.0 must lie between"),
        (lambda: OptimizerConfig(decay="x"), "optimizer.decay='x'"),
        (
            lambda: TrainConfig(micro_batch_size=3, global_batch_size=8),
            "global_batch_size=8 is not divisible by micro_batch_size .* use a multiple of 3",
        ),
        (
            lambda: TrainConfig(parallel=ParallelConfig(pipeline=3)),
            "model.num_layers=4 is not divisible by parallel.pipeline .* = 3",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(num_layers=4),
                parallel=ParallelConfig(pipeline=2, virtual=2),
            ),
            "parallel.pipeline=2 with parallel.virtual > 1 sends to the same peer",
        ),
        (
            lambda: TrainConfig(
                parallel=ParallelConfig(pipeline=4, virtual=1), model=ModelConfig(num_layers=6)
            ),
            "model.num_layers=6 is not divisible",
        ),
        (
            lambda: ParallelConfig(pipeline=3, schedule="dualpipe"),
            "parallel.pipeline=3 is odd, and dualpipe has two directions; use parallel.pipeline=4 ",
        ),
        (
            lambda: TrainConfig(
                parallel=ParallelConfig(pipeline=2, schedule="dualpipe"),
                micro_batch_size=1,
                global_batch_size=5,
            ),
            "5 micro-batches per step are an odd number, and dualpipe sends a half in each",
        ),
        (
            lambda: ParallelConfig(pipeline=2, schedule="interleaved"),
            "'interleaved' is Megatron's own; use parallel.virtual > 1",
        ),
        (lambda: TrainConfig(timeout_minutes=0), "timeout_minutes=0 must be positive"),
        (
            lambda: ParallelConfig(first_stage_layers=1),
            "parallel.first_stage_layers=1 needs parallel.pipeline > 1 and parallel.virtual=1",
        ),
        (
            lambda: ParallelConfig(pipeline=2, last_stage_layers=0),
            "parallel.last_stage_layers=0 must be at least 1",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(num_layers=8),
                parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v", first_stage_layers=1),
            ),
            "first_stage_layers=1 and .*=None leave 7 of model.num_layers=8 for 3 other stages",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(num_layers=8),
                parallel=ParallelConfig(pipeline=2, first_stage_layers=3, last_stage_layers=4),
            ),
            "first_stage_layers=3 and .*=4 leave 1 of model.num_layers=8 for 0 other stages",
        ),
        (
            lambda: ParallelConfig(pipeline=2, schedule="x"),
            "parallel.schedule='x' is not one of megatron, gpipe, one_f_one_b, zb_h1, dualpipe_v",
        ),
        (
            lambda: ParallelConfig(schedule="zb_h1"),
            "parallel.schedule='zb_h1' needs parallel.pipeline > 1",
        ),
        (
            lambda: ParallelConfig(pipeline=4, virtual=2, schedule="zb_h1"),
            "parallel.virtual=2 is for parallel.schedule='megatron'",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(num_layers=6),
                parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v"),
            ),
            r"model.num_layers=6 is not divisible by parallel.pipeline \* 2 \(dualpipe_v\) = 4",
        ),
        (
            lambda: TrainConfig(parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v")),
            "2 micro-batches per step are below 2 .* = 4, which dualpipe_v needs; raise global_b",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(mtp_num_layers=1),
                parallel=ParallelConfig(pipeline=2, schedule="dualpipe_v"),
                micro_batch_size=1,
            ),
            "model.mtp_num_layers=1 under dualpipe_v: .* use another parallel.schedule",
        ),
        (
            lambda: TrainConfig(parallel=ParallelConfig(tensor=3)),
            "model.num_attention_heads=4 is not divisible by parallel.tensor=3",
        ),
        (
            lambda: TrainConfig(parallel=ParallelConfig(context=2)),
            "parallel.context=2 needs transformer_impl='transformer_engine'",
        ),
        (
            lambda: TrainConfig(parallel=ParallelConfig(expert=2, data=2)),
            "parallel.expert=2 needs model.num_moe_experts",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(num_moe_experts=4), parallel=ParallelConfig(tensor=2)
            ),
            "MoE with parallel.tensor > 1 needs parallel.sequence=True",
        ),
        (lambda: TrainConfig(fp8="e5m2"), "fp8='e5m2' is not one of None, hybrid, e4m3"),
        (lambda: TrainConfig(fp8_recipe="x"), "fp8_recipe='x' is not one of delayed, tensorwise,"),
        (
            lambda: TrainConfig(fp8_amax_compute_algo="mean"),
            "fp8_amax_compute_algo='mean' is not one of most_recent, max",
        ),
        (lambda: TrainConfig(fp8_amax_history_len=0), "fp8_amax_history_len=0 must be at least 1"),
        (
            lambda: TrainConfig(fp8_amax_history_len=1024),
            "fp8_amax_history_len=1024, fp8_amax_compute_algo='most_recent': only delayed scaling",
        ),
        (lambda: TrainConfig(fp8="hybrid"), "needs transformer_impl='transformer_engine': mega"),
        (
            lambda: ModelConfig(moe_token_dispatcher="allgather"),  # type: ignore[arg-type]
            "model.moe_token_dispatcher='allgather' is not one of alltoall, flex",
        ),
        (
            lambda: TrainConfig(model=ModelConfig(moe_token_dispatcher="flex")),
            "model.num_moe_experts=None: a dense model dispatches no tokens; set model.moe_token",
        ),
        (
            lambda: TrainConfig(model=FLEX),
            "Megatron has it exchange tokens between ranks only; raise parallel.expert, or set",
        ),
        (
            lambda: TrainConfig(
                model=dataclasses.replace(FLEX, moe_expert_capacity_factor=1.0), **ON_GPUS
            ),
            "model.moe_expert_capacity_factor=1.0: DeepEP does not pad .*; set it to None, or set",
        ),
        (
            lambda: TrainConfig(model=FLEX, cuda_graph=True, **ON_GPUS),
            "cuda_graph=True: the host waits .*; set cuda_graph=False, or set model.moe_token",
        ),
        (
            lambda: TrainConfig(model=FLEX, parallel=ParallelConfig(data=2, expert=2)),
            "dtype='fp32': DeepEP sums up tokens in bf16 only; set dtype='bf16', or set model.moe",
        ),
        (
            lambda: TrainConfig(cuda_graph=True, model=ModelConfig(num_moe_experts=4)),
            "cuda_graph=True does not combine with model.num_moe_experts=4: the host reads .*; set "
            "model.moe_expert_capacity_factor, or set",
        ),
        (
            lambda: ModelConfig(num_moe_experts=4, moe_expert_capacity_factor=0.0),
            "model.moe_expert_capacity_factor=0.0 must be positive; None drops no token",
        ),
        (
            lambda: ModelConfig(moe_expert_capacity_factor=1.0),
            "model.moe_expert_capacity_factor=1.0 needs model.num_moe_experts",
        ),
        (
            lambda: TrainConfig(
                cuda_graph=True, dtype="fp16", parallel=ParallelConfig(distributed_optimizer=True)
            ),
            "cuda_graph=True does not combine with dtype='fp16': the loss scale .*; use bf16",
        ),
        (
            lambda: TrainConfig(
                cuda_graph=True,
                transformer_impl="transformer_engine",
                parallel=ParallelConfig(context=2),
            ),
            "cuda_graph=True does not combine with parallel.context=2: Megatron copies",
        ),
        (
            lambda: TrainConfig(cuda_graph=True, recompute="full"),
            "cuda_graph=True does not combine with recompute='full': .*, or set cuda_graph=False",
        ),
        (
            lambda: TrainConfig(
                model=ModelConfig(seq_length=36),
                micro_batch_size=2,
                transformer_impl="transformer_engine",
                fp8="hybrid",
            ),
            r"a micro-batch has 72 tokens on a rank \(micro_batch_size \* model.seq_length / 1\)",
        ),
        (lambda: TrainConfig(dtype="bf16"), "needs parallel.distributed_optimizer=True"),
        (lambda: TrainConfig(steps=0), "steps=0 must be at least 1"),
        (lambda: load_recipe("stdlib-smal"), "did you mean 'stdlib-small'"),
        (lambda: load_recipe("no.such:thing"), "cannot be loaded"),
    ],
)
def test_bad_value_is_named(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name: str) -> None:
    assert load_recipe(name).parallel.world_size in (1, 2)


def test_learning_rate_closed_forms() -> None:
    cosine = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=10)
    assert learning_rate(cosine, 0, 110) == 0.1
    assert learning_rate(cosine, 9, 110) == 1.0
    assert learning_rate(cosine, 60, 110) == pytest.approx(0.6, abs=1e-15)
    assert learning_rate(cosine, 110, 110) == pytest.approx(0.2, abs=1e-15)
    step = dataclasses.replace(cosine, decay="step")
    assert [learning_rate(step, s, 100) for s in (10, 79, 80, 89, 90)] == [
        1.0,
        1.0,
        0.316,
        0.316,
        0.1,
    ]
