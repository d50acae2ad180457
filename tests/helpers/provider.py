"""A provider with the public surface of Megatron-Bridge's GPTModelProvider, and jobs with it.

Read: NVIDIA-NeMo/Megatron-Bridge, models/gpt_provider.py at 0254ddd4 and models/model_provider.py
at 08fa42ca.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from helpers.layouts import VOCAB, micro_batches, randomise
from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import World
from mhc_megatron.pretrain.provider import hyper_connect_provider
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import build_chunks, padded_vocab_size, transformer_config
from mhc_megatron.training.pipeline import forward_backward_func
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.step import run_step


def local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_local_spec(normalization=config.normalization)


@dataclass
class GPTModelProvider(TransformerConfig):
    transformer_layer_spec: ModuleSpec | Callable[..., Any] = local_layer_spec
    vocab_size: int | None = None
    seq_length: int = 1024
    use_transformer_engine_op_fuser: bool = False
    use_transformer_engine_full_layer_spec: bool = False
    restore_modelopt_state: bool = False

    def register_post_wrap_hook(self, hook: Callable[..., Any], prepend: bool = False) -> None:
        self._post_wrap_hooks = [*getattr(self, "_post_wrap_hooks", []), hook]

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        spec = self.transformer_layer_spec
        if not isinstance(spec, ModuleSpec):
            takes_stage = "vp_stage" in inspect.signature(spec).parameters
            spec = spec(self, vp_stage=vp_stage) if takes_stage else spec(self)
        first, last = (
            parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        )
        return GPTModel(
            self,
            transformer_layer_spec=spec,
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pre_process or first,
            post_process=post_process or last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )


def provider_of(config: TrainConfig, **options: Any) -> GPTModelProvider:
    """The provider of our trainer's model; ``options`` are fields that differ."""
    provider = GPTModelProvider(num_layers=1, hidden_size=8, num_attention_heads=1)
    provider.__dict__.update(vars(transformer_config(config)))
    provider.vocab_size = padded_vocab_size(VOCAB)
    provider.seq_length = config.model.seq_length
    provider.__dict__.update(options)
    return provider


def losses(rank: int, world_size: int, config: TrainConfig) -> tuple[float, float]:
    """Of our trainer's model and of the provider's, at the same randomised parameters."""
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        megatron_config = transformer_config(config)
        ours = build_chunks(config, megatron_config, vocab_size=VOCAB)
        randomise(ours, seed=7)
        provider = provider_of(config)
        hyper_connect_provider(provider, config.mhc)
        provided = provider.provide().to(torch.cuda.current_device())
        provided.load_state_dict(ours[0].state_dict())
        batches = micro_batches(config, step=0)
        return (
            run_step(
                config,
                forward_backward_func(config, megatron_config),
                ours,
                batches,
                forward_only=True,
            ),
            run_step(config, get_forward_backward_func(), [provided], batches, forward_only=True),
        )


def refusals(
    rank: int, world_size: int, config: TrainConfig, cases: list[dict[str, Any]]
) -> list[str]:
    """What the provider says to each case's fields when it builds its model."""
    told = []
    with distributed_runtime(config, World(rank=rank, local_rank=rank, world_size=world_size)):
        for options in cases:
            provider = provider_of(config, **options)
            hyper_connect_provider(provider, config.mhc)
            try:
                provider.provide()
            except UserError as error:
                told.append(str(error))
    return told
