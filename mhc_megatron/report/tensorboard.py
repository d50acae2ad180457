"""The metrics of a run as TensorBoard scalars."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from mhc_megatron.gains import Gains
from mhc_megatron.report.curves import peak

_TAGS = {
    "loss": "loss/train",
    "valid_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens_per_s": "speed/tokens_per_s",
    "joules_per_token": "gpu/joules_per_token",
    "gpu_busy": "gpu/busy",
}


class TensorBoardLog:
    """Writes event files into ``folder``; look at them with ``tensorboard --logdir folder``.

    Args:
        folder: directory of the event files.
        done: completed steps, 0 for a new run. TensorBoard hides what an earlier process wrote for
            the steps after them.
    """

    def __init__(self, folder: Path | str, *, done: int = 0) -> None:
        # A new run purges from step 0, which also hides a validation before the first step.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else 0)

    def write(self, line: Mapping[str, float]) -> None:
        """The scalars of one line of metrics.jsonl; keys without a tag are left out."""
        for key, tag in _TAGS.items():
            if line.get(key) is not None:
                self._writer.add_scalar(tag, line[key], int(line["step"]))

    def write_gains(self, step: int, gains: Gains) -> None:
        """The maxima over depth of the gain magnitudes."""
        for tag, value in gain_scalars(gains):
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the event file."""
        self._writer.close()

    def __enter__(self) -> "TensorBoardLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def gain_scalars(gains: Gains) -> Iterator[tuple[str, float]]:
    """(tag, maximum over depth) of every gain magnitude."""
    for kind, curves in (("single", gains.single), ("composite", gains.composite)):
        for measure in ("forward", "backward", "log_column"):
            yield f"gain_{kind}/{measure}", peak(getattr(curves, measure))


def timing_scalars(milliseconds: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """(tag, milliseconds of a step) of what ``HyperConnectionTimer.milliseconds`` returned."""
    for kind, value in milliseconds.items():
        yield f"hyper_connection_ms/{kind}", value
