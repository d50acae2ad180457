"""One step of a run, recorded by torch's profiler on every rank, for ``mhc-megatron trace``."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from mhc_megatron.training.config import TrainConfig

FOLDER = "traces"


def trace_file(folder: Path, step: int, rank: int) -> Path:
    """Where a rank's trace of ``step``, counted from 1, is written in a run's folder."""
    return folder / FOLDER / f"step_{step:08d}_rank_{rank:04d}.json.gz"


@contextlib.contextmanager
def recorded(config: TrainConfig, step: int) -> Iterator[None]:
    """Record what runs inside, if ``step`` (from 1) is ``config.profile_step``.

    The file is there when the context ends. A recorded step takes longer than others.
    """
    if step != config.profile_step:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    path = trace_file(Path(config.out), step, torch.distributed.get_rank())
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
