"""Jobs of several processes that time steps of the package's trainer."""

from dataclasses import dataclass

import torch
from ranks import clear_dispatchers
from step_models import WARM_UP

from mhc_megatron.launch.environment import World
from mhc_megatron.megatron.attention import AttentionKernels, attention_kernels
from mhc_megatron.megatron.step_graph import StepGraph
from mhc_megatron.pipeline.measure import Spans
from mhc_megatron.pipeline.stopwatch import stopwatch
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.runtime import distributed_runtime
from mhc_megatron.training.trainer import Trainer


@dataclass(kw_only=True)
class Timed:
    """What a rank measured.

    Attributes:
        seconds: of every timed step.
        receiving: seconds inside receives in the measured step, under Megatron's own schedules.
        spans: of all ranks' actions in the measured step, under a schedule of ours.
        peak_bytes: allocated at most; 0 without a GPU.
        attention: kernels that Transformer Engine computed it with, if it did.
    """

    seconds: list[float]
    receiving: float
    spans: list[Spans]
    peak_bytes: int
    attention: AttentionKernels | None


def time_steps(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Timed]:
    """A job: steps of several runs that have one layout."""
    found = []
    world = World(rank=rank, local_rank=rank, world_size=world_size)
    with distributed_runtime(configs[0], world):
        for config in configs:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            found.append(_time(config))
            clear_dispatchers()
            torch.cuda.empty_cache()
    return found


def _time(config: TrainConfig) -> Timed:
    trainer = Trainer(config)
    metrics = [trainer.step(step) for step in range(config.steps - 1)]
    timers = Timers()
    trainer.megatron_config.timers = timers
    last = trainer.step(config.steps - 1)
    if isinstance(trainer.forward_backward, StepGraph):
        trainer.forward_backward.forget()
    # The optimizer keeps views of float32 parameters, behind which Python's collector cannot see:
    # without this the configuration and the model would keep each other, beside the next run.
    trainer.megatron_config.grad_scale_func = trainer.megatron_config.no_sync_func = None
    on_gpu = torch.cuda.is_available()
    return Timed(
        seconds=[step.seconds for step in metrics[WARM_UP:]],
        receiving=timers.receiving(),
        spans=last.spans,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        attention=attention_kernels(),
    )


class Timers:
    """What Megatron's schedules call as ``config.timers``: a stopwatch for each of its names."""

    def __init__(self) -> None:
        self._by_name: dict[str, Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "Timer":
        return self._by_name.setdefault(name, Timer())

    def receiving(self) -> float:
        """Seconds between start and end of what receives."""
        return sum(
            end - start
            for name, timer in self._by_name.items()
            if "recv" in name
            for start, end in timer.watch.spans()
        )


class Timer:
    """One of Megatron's timers."""

    def __init__(self) -> None:
        self.watch = stopwatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def start(self, barrier: bool = False) -> None:
        """Megatron's; the barrier would become part of what is measured."""
        self.watch.start()

    def stop(self) -> None:
        """Megatron's."""
        self.watch.stop()
