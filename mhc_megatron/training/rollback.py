"""Back to the last checkpoint after a bad step, by all ranks together."""

from pathlib import Path

import torch

from mhc_megatron.errors import UserError
from mhc_megatron.report.rollbacks import (
    Rollback,
    forget_rollbacks,
    read_rollbacks,
    write_rollbacks,
)
from mhc_megatron.training import guard
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.trainer import StepMetrics, Trainer, on_rank_zero


class Rollbacks:
    """The steps that a run leaves out. Made by all ranks together, after ``Trainer.resume``.

    A bad step is left out for good: there is no update at that step, and every other step has the
    batch and the learning rate that it has without the guard. What was left out is in the run's
    folder, so that a resumed run leaves out the same and counts on.

    Args:
        config: the run.
        folder: the run directory.
        done: completed steps. At 0 the run begins anew, and nothing is left out yet.
    """

    def __init__(self, config: TrainConfig, folder: Path, *, done: int) -> None:
        self._config, self._folder = config, folder
        self._found = on_rank_zero(lambda: self._read(done))
        self._losses: dict[int, float] = {}  # by step; of this process

    def leaves_out(self, step: int) -> bool:
        """Whether the 1-based ``step`` is one of them."""
        return any(rollback.step == step for rollback in self._found)

    def problem(self, step: int, metrics: StepMetrics) -> str | None:
        """What is wrong with a step; None if it is good on all ranks, which call this together.

        Args:
            step: completed, from 1.
            metrics: of that step.
        """
        options = self._config.guard
        if not options.max_rollbacks:
            return None
        judged = self._config.dtype != "fp16" and self._config.optimizer.clip_grad > 0
        found = guard.problem(
            options,
            loss=metrics.loss,
            grad_norm=metrics.grad_norm if judged else None,
            before=list(self._losses.values()),
        )
        bad = torch.tensor([float(found is not None)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad.item():
            return found or "another rank's numbers are bad"
        self._losses[step] = metrics.loss
        return None

    def roll_back(self, trainer: Trainer, step: int, problem: str) -> Rollback:
        """Load the newest checkpoint, and leave ``step`` out from now on.

        Raises:
            UserError: ``guard.max_rollbacks`` are used up, or it is the first step.
        """
        trainer.finish_save()
        if step == 1:
            raise UserError(
                f"{problem} at step 1, before there is a checkpoint to go back to: no batch is to "
                "blame, but the model, its initialisation or the data as a whole"
            )
        limit = self._config.guard.max_rollbacks
        if len(self._found) >= limit:
            steps = ", ".join(str(rollback.step) for rollback in self._found)
            raise UserError(
                f"{problem} at step {step}, and guard.max_rollbacks={limit} are used up (left out: "
                f"steps {steps}); stopped, the last checkpoint is intact. Lower optimizer.lr, look "
                "at the data of these steps, or raise guard.max_rollbacks"
            )
        done = trainer.resume()
        rollback = Rollback(step=step, back_to=done, problem=problem)
        self._found = [*self._found, rollback]
        on_rank_zero(lambda: write_rollbacks(self._folder, self._found))
        self._losses = {before: loss for before, loss in self._losses.items() if before <= done}
        return rollback

    def _read(self, done: int) -> list[Rollback]:
        if not done:
            forget_rollbacks(self._folder)
        return read_rollbacks(self._folder)
