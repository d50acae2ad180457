"""Being told to stop by the cluster: a signal to some rank, an answer of all, between two steps."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from mhc_megatron.launch.slurm.script import requeue_request


class StopRequest:
    """Whether a signal has come. Made by ``stop_request``."""

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self._listens = bool(signals)
        self._came: signal.Signals | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Remember it; the step goes on to its end."""
        self._came = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any rank was told. Called by all ranks after the same step."""
        if not self._listens:
            return False
        import torch  # the handlers are there before this takes its seconds

        told = torch.tensor([float(self._came is not None)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.item())


@contextlib.contextmanager
def stop_request(signals: Sequence[signal.Signals]) -> Iterator[StopRequest]:
    """Listen to ``signals``, in the main thread; they have their old meaning again afterwards."""
    request = StopRequest(signals)
    before = {number: signal.signal(number, request.handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask_to_be_queued_again(folder: Path) -> None:
    """For the batch script, once everything is saved. Called on one rank.

    Args:
        folder: the run's.
    """
    request = Path(requeue_request(str(folder)))
    request.parent.mkdir(parents=True, exist_ok=True)
    request.touch()
