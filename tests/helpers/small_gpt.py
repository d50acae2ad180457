"""A GPT of local modules on sequences of eight tokens, at parameters where no gradient vanishes."""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from helpers import layouts
from mhc_megatron.megatron.spec import gpt_block_spec
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.model import transformer_config


def build(config: TrainConfig) -> GPTModel:
    """The model of a run; inside ``distributed_runtime``."""
    megatron_config = transformer_config(config)
    model = GPTModel(
        config=megatron_config,
        transformer_layer_spec=gpt_block_spec(
            megatron_config, config.mhc, use_transformer_engine=False
        ),
        vocab_size=128,
        max_sequence_length=8,
        position_embedding_type="rope",
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def losses_of(model: GPTModel, index: int) -> Tensor:
    """Of every token of a sample."""
    sample = layouts.sample(index, 8)
    return model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
