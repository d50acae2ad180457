"""From a TrainConfig to Megatron's GPT model chunks on this rank."""

import contextlib
from dataclasses import asdict
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from mhc_megatron import kernels
from mhc_megatron.errors import UserError
from mhc_megatron.megatron.chunks import stage_place
from mhc_megatron.megatron.delayed_wgrad import delay_weight_gradients
from mhc_megatron.megatron.spec import gpt_block_spec, gpt_mtp_spec
from mhc_megatron.megatron.split_linear import split_linears
from mhc_megatron.megatron.step_graph import capture_stream
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.pipeline import pipeline_schedule
from mhc_megatron.training.runtime import set_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Divisible by any TP size up to 128, so that a checkpoint's vocabulary fits every layout.
VOCAB_MULTIPLE = 128
# DeepSeek-V3's latent widths (1536 and 512) and rotary width (64) relative to its heads of 128.
_MLA_Q_LATENT_HEADS, _MLA_KV_LATENT_HEADS, _MLA_ROPE_SHARE = 12, 4, 2


def padded_vocab_size(vocab_size: int) -> int:
    """The embedding's rows: the vocabulary rounded up to a multiple of 128."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def transformer_config(config: TrainConfig) -> TransformerConfig:
    """Megatron's configuration of the run's transformer and layout."""
    model, layout = config.model, config.parallel
    dtype = DTYPES[config.dtype]
    arguments: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "init_method_std": model.init_method_std,
        "layernorm_epsilon": model.norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": config.dtype == "bf16",
        "fp16": config.dtype == "fp16",
        "tensor_model_parallel_size": layout.tensor,
        # A schedule of ours places its stages itself (megatron/chunks.py).
        "pipeline_model_parallel_size": (
            layout.pipeline if layout.schedule == "megatron" else layout.num_stages
        ),
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "sequence_parallel": layout.sequence,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "gradient_accumulation_fusion": False,
        "deallocate_pipeline_outputs": True,
        "batch_p2p_sync": not config.cuda_graph,  # the host cannot wait while a step is captured
        "transformer_impl": config.transformer_impl,
        "fp8": config.fp8,
        "fp8_recipe": config.fp8_recipe,
        "fp8_amax_history_len": config.fp8_amax_history_len,
        "fp8_amax_compute_algo": config.fp8_amax_compute_algo,
        "mtp_num_layers": model.mtp_num_layers,
        "finalize_model_grads_func": finalize_model_grads,
    }
    if model.mtp_num_layers is not None:
        arguments["mtp_loss_scaling_factor"] = model.mtp_loss_scaling_factor
    if model.num_moe_experts is not None:
        arguments |= {
            "num_moe_experts": model.num_moe_experts,
            "moe_router_topk": model.moe_router_topk,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
            "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
            "moe_pad_expert_input_to_capacity": model.moe_expert_capacity_factor is not None,
            "moe_layer_freq": model.moe_layer_freq,
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_token_dispatcher_type": model.moe_token_dispatcher,
            "moe_grouped_gemm": config.transformer_impl == "transformer_engine",
            "moe_router_dtype": "fp32",
        }
    if config.recompute == "full":
        arguments |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif config.recompute == "core_attn":
        arguments |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if not model.multi_latent_attention:
        return _delayed(config, TransformerConfig(**arguments))
    head = model.hidden_size // model.num_attention_heads
    megatron_config = MLATransformerConfig(
        **arguments,
        multi_latent_attention=True,
        qk_layernorm=True,
        q_lora_rank=_MLA_Q_LATENT_HEADS * head,
        kv_lora_rank=_MLA_KV_LATENT_HEADS * head,
        qk_head_dim=head,
        qk_pos_emb_head_dim=head // _MLA_ROPE_SHARE,
        v_head_dim=head,
        rope_type="rope",
    )
    return _delayed(config, megatron_config)


def _delayed(config: TrainConfig, megatron_config: TransformerConfig) -> TransformerConfig:
    """With weight gradients that wait for the schedule's W, where it has one."""
    # Local modules are split when they are built (split_linears).
    if config.parallel.splits_backward and config.transformer_impl == "transformer_engine":
        delay_weight_gradients(megatron_config)
    return megatron_config


def build_chunks(
    config: TrainConfig, megatron_config: TransformerConfig, *, vocab_size: int
) -> list[torch.nn.Module]:
    """The GPT model chunks of this pipeline rank, on the run's device.

    Args:
        config: the run.
        megatron_config: from ``transformer_config``.
        vocab_size: tokens the data may hold; padded inside.

    Returns:
        A chunk per virtual stage, or per stage that the schedule gives this rank, in the order of
        the model's layers; in half precision wrapped in Megatron's ``Float16Module``.

    Raises:
        UserError: ``mhc.backend="triton"`` or ``"native"`` where the kernels cannot run.
    """
    require_kernels(config)
    if config.parallel.schedule == "megatron":
        virtual = config.parallel.virtual
        vp_stages = range(virtual) if virtual > 1 else [None]
        return [_megatron_chunk(config, megatron_config, vp, vocab_size) for vp in vp_stages]
    rank = parallel_state.get_pipeline_model_parallel_rank()
    stages = pipeline_schedule(config).placement.stages_on(rank)
    return [stage_chunk(config, megatron_config, stage, vocab_size=vocab_size) for stage in stages]


def require_kernels(config: TrainConfig) -> None:
    """Say before the model is built what its first step would.

    Raises:
        UserError: ``mhc.backend="triton"`` or ``"native"`` where the kernels cannot run, and why.
    """
    if not config.mhc.requires_kernels or config.model.residual != "mhc":
        return
    streams = torch.empty(
        (0, config.mhc.num_streams, config.model.hidden_size),
        dtype=DTYPES[config.dtype],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    options = kernels.MappingOptions(projection=config.mhc.projection)
    try:
        kernels.choose_backend(streams, options=options, backend=config.mhc.backend)
    except ValueError as error:
        raise UserError(f"mhc.{error}; set mhc.backend=auto, which takes what can run") from None


def _megatron_chunk(
    config: TrainConfig, megatron_config: TransformerConfig, vp_stage: int | None, vocab_size: int
) -> torch.nn.Module:
    """The chunk where Megatron's own schedules expect it."""
    return _chunk(
        config,
        megatron_config,
        {"vp_stage": vp_stage},
        vocab_size=vocab_size,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
    )


def stage_chunk(
    config: TrainConfig, megatron_config: TransformerConfig, stage: int, *, vocab_size: int
) -> torch.nn.Module:
    """The chunk of a stage of ``pipeline_schedule``, with weights that depend on the stage only.

    Args:
        config: the run.
        megatron_config: from ``transformer_config``.
        stage: of the model.
        vocab_size: tokens the data may hold; padded inside.

    Returns:
        As ``build_chunks``.
    """
    set_seed(config.seed, stage=stage)
    place = stage_place(megatron_config, stage)
    chunk = _chunk(
        config,
        megatron_config,
        {"pp_rank": stage},
        vocab_size=vocab_size,
        pre_process=place.pre_process,
        post_process=place.post_process,
        pg_collection=place.groups,
    )
    split_linears(chunk)
    return chunk


def _chunk(
    config: TrainConfig,
    megatron_config: TransformerConfig,
    where: dict[str, Any],
    **arguments: Any,
) -> torch.nn.Module:
    """A GPTModel; ``where`` says to its layer specs which stage it is."""
    mhc = config.mhc if config.model.residual == "mhc" else None
    where = {
        "use_transformer_engine": config.transformer_impl == "transformer_engine",
        **where,
    }
    chunk: torch.nn.Module = GPTModel(
        config=megatron_config,
        transformer_layer_spec=gpt_block_spec(megatron_config, mhc, **where),
        max_sequence_length=config.model.seq_length,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=gpt_mtp_spec(megatron_config, **where),
        **{**arguments, "vocab_size": padded_vocab_size(arguments["vocab_size"])},
    )
    if torch.cuda.is_available():
        chunk = chunk.cuda(torch.cuda.current_device())
    if config.dtype != "fp32":
        chunk = Float16Module(megatron_config, chunk)
    return chunk


def wrap_data_parallel(
    config: TrainConfig, megatron_config: TransformerConfig, chunks: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Megatron's DDP around every chunk, with float32 gradient accumulation.

    Sets the configuration's hooks (``no_sync_func``, ``grad_scale_func`` stays with the
    optimizer) that the pipeline schedules call.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        delay_wgrad_compute=megatron_config.delay_wgrad_compute,
    )
    # With disable_bucketing, which Megatron sets for all chunks but the first, a chunk's bf16 and
    # float32 parameters are gathered in one call, where gloo takes all for one dtype's.
    with contextlib.ExitStack() as stack:
        if config.cuda_graph:
            capture_stream().wait_stream(torch.cuda.current_stream())
            stack.callback(torch.cuda.synchronize)
            stack.enter_context(torch.cuda.stream(capture_stream()))
        wrapped = [
            DistributedDataParallel(config=megatron_config, ddp_config=ddp_config, module=chunk)
            for chunk in chunks
        ]
    no_sync = [chunk.no_sync for chunk in wrapped]
    megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def count_parameters(chunks: list[torch.nn.Module]) -> int:
    """Parameters of the whole model: sharded ones (TP, EP) counted whole, PP stages summed."""
    count = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            shards = 1
            if getattr(parameter, "tensor_model_parallel", False):
                shards = parallel_state.get_tensor_model_parallel_world_size()
            if not getattr(parameter, "allreduce", True):
                shards = parallel_state.get_expert_model_parallel_world_size()
            count += parameter.numel() * shards
    total = torch.tensor(count, dtype=torch.int64, device=torch.cuda.current_device())
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_reduce(total, group=group)
    return int(total.item())


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested plain data, for JSON."""
    return asdict(config)
