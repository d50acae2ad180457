"""A whole run: resume, steps, validations, checkpoints, and what people look at."""

from mhc_megatron.launch.environment import World
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.record import RunRecord
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.trainer import Trainer


def train(config: TrainConfig, world: World) -> None:
    """Train to the last step, resuming from the newest checkpoint if there is one.

    Called in every process of the layout. Rank 0 writes metrics, TensorBoard scalars and the
    report into ``config.out``.

    Raises:
        UserError: bad data, layout or checkpoint; a loss or gradient that is not finite (the last
            checkpoint stays as it was).
    """
    with distributed_runtime(config, world):
        trainer = Trainer(config)
        done = trainer.resume()
        record = RunRecord(
            config, parameters=trainer.parameters, done=done, enabled=world.rank == 0
        )
        with record:
            for step in range(done, config.steps):
                record.step(step + 1, trainer.step(step))
                if _due(config, step + 1, config.eval_interval):
                    record.validation(step + 1, *trainer.evaluate())
                if _due(config, step + 1, config.save_interval):
                    trainer.save(step + 1)


def _due(config: TrainConfig, step: int, interval: int) -> bool:
    """Every ``interval`` steps (never for 0) and after the last one."""
    return step == config.steps or (interval > 0 and step % interval == 0)
