"""The learning rate as a pure function of the step."""

import math

from mhc_megatron.training.config import OptimizerConfig

# The mHC paper's step decay (Table 5): from this fraction of the steps, this share of the peak.
_STEP_DECAY = ((0.9, 0.1), (0.8, 0.316))


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of one optimizer step.

    Args:
        optimizer: peak and floor, warm-up, kind of decay.
        step: 0-based.
        total_steps: the whole run's; the decay ends there.

    Returns:
        Linear warm-up to ``lr``, then cosine to ``min_lr`` or the paper's steps.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.decay == "step":
        for fraction, share in _STEP_DECAY:
            if step >= fraction * total_steps:
                return optimizer.lr * share
        return optimizer.lr
    decay_steps = max(1, total_steps - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * cosine
