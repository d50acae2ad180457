"""Why a checkpoint could not be written, from what torch and Megatron leave of the error."""

import re
import shutil
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from mhc_megatron.errors import UserError

# What a system call says. torch's archive writer says instead that a position is not as expected,
# and core 0.19 keeps no more of a writer's exception than its class.
_SYSTEM_ERROR = re.compile(r"\[Errno \d+\] [^\n:'\")]+")
_HIDDEN_ERROR = re.compile(
    r"PytorchStreamWriter|inline_container|iostream error|error: <class '(OS|Runtime)Error'>"
)

# Megatron's words when a writer in the background has ended without a result.
_DEAD_WRITER = "results_queue should not be empty"


def require_disk(error: BaseException, final: Path) -> None:
    """Raise a UserError if ``error`` is the disk's; another is a defect and stays what it is.

    Megatron tells every rank that a shard has failed, and rank 0 which. What only rank 0 writes
    fails on rank 0 alone, so that no collective may be called here: its exit ends the others.
    """
    texts = _texts(error)
    if found := _SYSTEM_ERROR.search(texts):
        reason = found.group()
    elif _DEAD_WRITER in texts:
        reason = "its background writer was killed, as where memory is short"
    elif _HIDDEN_ERROR.search(texts):
        reason = "the file writer failed, as on a full disk"
    elif isinstance(error, CheckpointException) and not error.failures:
        reason = "another rank could not write its part"
    else:
        return
    folder = next(path for path in final.parents if path.exists())
    free = shutil.disk_usage(folder).free / 2**20
    raise UserError(
        f"checkpoint {final} cannot be written: {reason} ({free:,.0f} MiB are free in {folder}); "
        "the checkpoints before it are intact. Make room there, or raise the quota or lower "
        "keep_checkpoints, and start the run again: it resumes from the newest checkpoint"
    ) from error


def _texts(error: BaseException | None) -> str:
    """Messages of an error and of what caused it, on other ranks too."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
