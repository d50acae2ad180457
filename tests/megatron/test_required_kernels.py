"""``mhc.backend=triton`` where the kernels cannot run: said before there is a model."""

import dataclasses

import pytest

from mhc_megatron.config import MHCConfig
from mhc_megatron.errors import UserError
from mhc_megatron.training.config import ModelConfig, TrainConfig
from mhc_megatron.training.model import build_chunks, require_kernels, transformer_config

CONFIG = TrainConfig(
    model=ModelConfig(hidden_size=100, num_attention_heads=4), mhc=MHCConfig(backend="triton")
)


def test_channels_that_no_kernel_takes() -> None:
    refused = pytest.raises(UserError, match=r"^mhc.backend='triton' .* channels=100 .*=auto")
    with refused:
        build_chunks(CONFIG, transformer_config(CONFIG), vocab_size=8)


@pytest.mark.parametrize("change", ["backend", "residual"])
def test_who_asks_for_none_is_not_refused(change: str) -> None:
    plain = dataclasses.replace(CONFIG.model, residual="plain")
    changes = {"backend": {"mhc": MHCConfig()}, "residual": {"model": plain}}
    require_kernels(dataclasses.replace(CONFIG, **changes[change]))
