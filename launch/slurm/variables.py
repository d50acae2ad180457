"""The environment of a job's ranks: one table, a reason for every entry. Pure."""

from typing import NamedTuple

from mhc_megatron.training.layout import ParallelConfig


class Variable(NamedTuple):
    """One environment variable and why it is set."""

    name: str
    value: str
    reason: str


def variables(layout: ParallelConfig, *, on_gpu: bool, cores: int | None) -> list[Variable]:
    """What every rank of a run gets, besides what SLURM sets.

    Args:
        layout: of the run.
        on_gpu: ranks have a GPU each.
        cores: of a rank; None if the cluster decides.
    """
    found = [
        Variable("PYTHONSAFEPATH", "1", "a checkout in the working directory hides the package"),
        Variable("PYTHONUNBUFFERED", "1", "the log ends with the last line, also after a crash"),
        Variable("OMP_NUM_THREADS", str(cores or 1), "a rank's share of the cores"),
    ]
    if not on_gpu:
        return found
    found += [
        Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a lost peer ends the job, no hang"),
        Variable("NCCL_DEBUG", "WARN", "NCCL says why it failed"),
        Variable(
            "PYTORCH_CUDA_ALLOC_CONF",
            "expandable_segments:True",
            "blocks of many sizes come and go with the micro-batches in flight",
        ),
        _connections(layout),
    ]
    return found


def _connections(layout: ParallelConfig) -> Variable:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if layout.overlap != "none":
        return Variable(name, "32", "parallel.overlap: no lane waits in another one's queue")
    if layout.tensor > 1 or layout.context > 1:
        return Variable(name, "1", "Megatron orders TP and CP communication before computation")
    return Variable(name, "8", "pipeline messages need no place in the compute stream's queue")
