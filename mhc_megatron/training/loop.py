"""A whole run: resume, steps, validations, checkpoints, and what people look at."""

from mhc_megatron.launch.environment import World
from mhc_megatron.report.heartbeat import FINISHED
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.heartbeat import hang_report
from mhc_megatron.training.record import RunRecord
from mhc_megatron.training.recorded import recorded
from mhc_megatron.training.rollback import Rollbacks
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.stop import StopRequest, ask_to_be_queued_again
from mhc_megatron.training.trainer import Trainer


def train(config: TrainConfig, world: World, stop: StopRequest) -> None:
    """Train to the last step, resuming from the newest checkpoint if there is one.

    Called in every process of the layout. Rank 0 writes metrics, TensorBoard scalars and the
    report into ``config.out``. Once any rank is told to ``stop``, all save after the step that
    is under way, ask to be queued again, and return.

    Raises:
        UserError: bad data, layout or checkpoint; a loss or gradient that is not finite (the last
            checkpoint stays as it was), or more bad steps than ``guard.max_rollbacks``.
        HangError: a rank does not answer within ``timeout_minutes``; says which, and who waits.
    """
    with distributed_runtime(config, world):
        trainer = Trainer(config)
        done = trainer.resume()
        record = RunRecord(
            config, parameters=trainer.parameters, done=done, enabled=world.rank == 0
        )
        with record, hang_report(trainer.folder), trainer.background:
            rollbacks = Rollbacks(config, trainer.folder, done=done)
            step = done
            while step < config.steps:
                trainer.poll_save()
                if rollbacks.leaves_out(step + 1):
                    record.left_out(step + 1)
                else:
                    with recorded(config, step + 1):
                        metrics = trainer.step(step)
                    problem = rollbacks.problem(step + 1, metrics)
                    if problem is not None:
                        rollback = rollbacks.roll_back(trainer, step + 1, problem)
                        record.rolled_back(rollback)
                        step = rollback.back_to
                        continue
                    record.step(step + 1, metrics)
                if _due(config, step + 1, config.eval_interval):
                    record.validation(step + 1, *trainer.evaluate())
                stops = step + 1 < config.steps and stop.agreed()
                # The guard wants something to go back to before a checkpoint is due. Megatron's
                # distributed optimizer has no state to save before its first step.
                first = step == 0 and config.guard.max_rollbacks > 0
                if stops or first or _due(config, step + 1, config.save_interval):
                    trainer.save(step + 1)
                if stops:
                    trainer.finish_save()
                    record.stopped(step + 1)
                    if world.rank == 0:
                        ask_to_be_queued_again(trainer.folder)
                    break
                step += 1
            trainer.finish_save()
        trainer.heartbeat.begin(FINISHED)


def _due(config: TrainConfig, step: int, interval: int) -> bool:
    """Every ``interval`` steps (never for 0) and after the last one."""
    return step == config.steps or (interval > 0 and step % interval == 0)
