"""A recipe of a user's own module."""

from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.recipes import stdlib_small


def small() -> TrainConfig:
    """``--recipe helpers.recipes:small``."""
    return stdlib_small()
