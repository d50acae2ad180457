"""A model chunk is given its phases, or refused."""

import torch

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.chain import LayerChain, chain_of
from mhc_megatron.megatron.phased_tensor import take_collectives
from mhc_megatron.megatron.phases import Lanes, PhaseMarker
from mhc_megatron.pipeline.phases import OverlapMode, stage_phases
from mhc_megatron.refusals import refuse_first


def mark_phases(
    chunk: torch.nn.Module, lanes: Lanes, mode: OverlapMode, *, ends_model: bool
) -> None:
    """Let the layers of a chunk say where their phases begin; once, before its first forward.

    Args:
        chunk: of MHCTransformerLayers.
        lanes: of this rank.
        mode: not ``none``.
        ends_model: the chunk has the final norm and the loss.

    Raises:
        UserError: the chunk cannot be interleaved.
    """
    chain = reject_unsupported_overlap(chain_of(chunk), mode)
    plan = [] if chain.recompute is None else chain.recompute.plan
    chain.collectives = take_collectives(chain.layers, lanes)
    chain.marker = PhaseMarker(
        stage_phases(
            [layer.is_moe_layer for layer in chain.layers],
            mode,
            block_ends={block.stop - 1 for block in plan},
            loss=ends_model,
            collectives=None if chain.collectives is None else chain.collectives.kind,
        ),
        lanes,
        rebuilds_ahead=mode in ("recompute", "all"),
    )


def reject_unsupported_overlap(chain: LayerChain | None, mode: OverlapMode) -> LayerChain:
    """The chain of a chunk that can be interleaved.

    Args:
        chain: of the chunk; None with the plain residual.
        mode: not ``none``.

    Raises:
        UserError: an option of the layers under which it cannot.
    """
    where = f"parallel.overlap={mode!r}"
    if chain is None:
        raise UserError(
            f"{where} interleaves the phases of layers with hyper-connections, and the plain "
            "residual's have none; set parallel.overlap='none'"
        )
    config = chain.layers[0].config
    if mode in ("recompute", "all") and chain.recompute is None:
        raise UserError(
            f"{where} with mhc.recompute='none' has no rebuild to run ahead; use "
            "parallel.overlap='post', or mhc.recompute='auto'"
        )
    dispatcher, backend = None, None
    if config.num_moe_experts is not None:
        dispatcher = config.moe_token_dispatcher_type
        backend = config.moe_flex_dispatcher_backend if dispatcher == "flex" else None
    change = "change one of them"
    refusals = (
        (
            config.recompute_granularity == "full",
            "recompute_granularity='full'",
            "a checkpointed layer runs its whole backward at once",
            change,
        ),
        (config.fp8, "fp8", "no test shows that amax histories stay those of a serial run", change),
        (
            dispatcher not in (None, "alltoall", "flex"),
            f"moe_token_dispatcher_type={dispatcher!r}",
            "it gathers all tokens, and what it keeps of them is not known to the lanes",
            "use 'alltoall', or 'flex' with moe_flex_dispatcher_backend='deepep'",
        ),
        (
            backend not in (None, "deepep"),
            f"moe_flex_dispatcher_backend={backend!r}",
            "of the flex dispatcher's backends only DeepEP's tensors are known to the lanes",
            "use 'deepep', or moe_token_dispatcher_type='alltoall'",
        ),
        (
            dispatcher is not None and config.moe_shared_expert_overlap,
            "moe_shared_expert_overlap=True",
            "it has a stream of its own between the same exchanges",
            change,
        ),
        (
            config.recompute_granularity == "selective" and "moe" in config.recompute_modules,
            "recompute_modules with 'moe'",
            "a checkpointed MoE layer runs its whole backward at once",
            change,
        ),
        (
            getattr(config, "cuda_graph_impl", "none") != "none",
            f"cuda_graph_impl={getattr(config, 'cuda_graph_impl', None)!r}",
            "a captured layer has no boundaries inside",
            change,
        ),
    )
    refuse_first(where, refusals, what_first=True)
    return chain
