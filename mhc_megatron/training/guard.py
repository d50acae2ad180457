"""When a step's numbers are no good: pure judgement, and its options."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mhc_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Going back to the last checkpoint after a bad step. Off by default.

    It is off because a run that goes on has trained on other data than asked for, and because a
    loss that is not finite is a wrong learning rate more often than a bad batch.

    Attributes:
        max_rollbacks: how often the whole run may go back to its newest checkpoint and leave the
            bad step out; 0 stops at the first loss or gradient that is not finite.
        spike_factor: a loss above this many times the median of the last ``spike_window`` losses is
            bad as well; None for no such limit.
        spike_window: losses in that median. There is no limit before there are so many.
    """

    max_rollbacks: int = 0
    spike_factor: float | None = None
    spike_window: int = 32

    def __post_init__(self) -> None:
        if self.max_rollbacks < 0:
            raise UserError(f"guard.max_rollbacks={self.max_rollbacks} must be at least 0")
        if self.spike_window < 1:
            raise UserError(f"guard.spike_window={self.spike_window} must be at least 1")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise UserError(f"guard.spike_factor={self.spike_factor} must be above 1")
        if self.spike_factor is not None and not self.max_rollbacks:
            raise UserError(
                f"guard.spike_factor={self.spike_factor} has no effect with guard.max_rollbacks=0; "
                "set guard.max_rollbacks too"
            )

    def check_saves(self, save_interval: int) -> None:
        """Raise a UserError where there would be no checkpoint to go back to."""
        if self.max_rollbacks and not save_interval:
            raise UserError(
                f"guard.max_rollbacks={self.max_rollbacks} goes back to checkpoints, and "
                "save_interval=0 makes one at the end only; set save_interval"
            )


def problem(
    guard: GuardConfig, *, loss: float, grad_norm: float | None, before: Sequence[float]
) -> str | None:
    """What is wrong with a step; None if it is good.

    Args:
        guard: its limits.
        loss: of the step.
        grad_norm: before clipping; None where it may be infinite (float16's loss scaling skips such
            a step by itself) or is not known.
        before: losses of the steps before it, oldest first.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if grad_norm is not None and not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    window = before[-guard.spike_window :]
    if guard.spike_factor is not None and len(window) == guard.spike_window:
        median = statistics.median(window)
        if loss > guard.spike_factor * median:
            return (
                f"loss {loss:.4f} is above {guard.spike_factor:g} x {median:.4f}, the median of "
                f"{guard.spike_window} steps"
            )
    return None
