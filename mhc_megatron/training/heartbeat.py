"""Signs of life of this rank, and what its error says when another rank does not answer."""

import contextlib
import dataclasses
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from mhc_megatron.errors import UserError
from mhc_megatron.launch.environment import node_name
from mhc_megatron.pipeline.actions import Action, Transfer
from mhc_megatron.pipeline.transport import TransferError
from mhc_megatron.report.heartbeat import (
    FOLDER,
    HANG_FILE,
    Beat,
    beat_file,
    encode,
    read_beats,
    summary,
    table,
)

_LONGEST_NAME = 64  # of a host, and of an action: a beat has a fixed size


class HangError(RuntimeError):
    """A rank did not answer. Says which one, and who waits for whom; ``__cause__`` is the error."""


class Heartbeat:
    """Overwrites this rank's beat wherever it begins something: one small write, no collective.

    Args:
        folder: the run directory.
        rank: of the whole run.

    Attributes:
        pipeline: global ranks of this rank's pipeline, in the order of the schedule's numbers.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.pipeline: Sequence[int] = ()
        self._file = os.open(beat_file(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self._file)
        self._beat = Beat(rank=rank, host=node_name()[:_LONGEST_NAME])
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._leaving: int | None = None  # for whom a message is being sent
        self.begin("starts")

    def begin(self, doing: str, *, step: int | None = None, together: bool = False) -> None:
        """A phase begins, which all ranks go through in the same order.

        Args:
            doing: its name.
            step: the optimizer step, from 1; None for the one before.
            together: it ends only when all ranks have come to it.
        """
        self._write(
            doing=doing,
            waits_for="all" if together else None,
            phase=self._beat.phase + 1,
            step=self._beat.step if step is None else step,
        )

    def item(self, item: Action | Transfer | None) -> None:
        """An item of a pipeline's program begins; None after the last (``execute``'s progress).

        Messages are counted over the run, as every step's are all sent and received: first in,
        first out, so that their numbers say which have left.
        """
        if self._leaving is not None:
            self._sent[self._leaving] = self._sent.get(self._leaving, 0) + 1
            self._leaving = None
        if item is None:
            self.begin("end of the pipeline", together=True)
        elif not isinstance(item, Transfer):
            self._write(doing=str(item), waits_for=None)
        elif item.kind == "recv":
            peer = self.pipeline[item.peer]
            self._received[peer] = self._received.get(peer, 0) + 1
            self._write(doing=str(item), waits_for=peer, awaits=self._received[peer])
        elif item.kind == "send":
            self._leaving = self.pipeline[item.peer]

    def _write(
        self,
        *,
        doing: str,
        waits_for: int | Literal["all"] | None,
        awaits: int = 0,
        phase: int | None = None,
        step: int | None = None,
    ) -> None:
        before = self._beat
        self._beat = dataclasses.replace(
            before,
            doing=doing[:_LONGEST_NAME],
            waits_for=waits_for,
            awaits=awaits,
            sent=dict(self._sent),
            phase=before.phase if phase is None else phase,
            step=before.step if step is None else step,
            time=time.time(),
        )
        os.pwrite(self._file, encode(self._beat), 0)


def prepare_heartbeats(folder: Path) -> None:
    """Make the folder without an earlier run's beats. On one rank, before any Heartbeat is made.

    Args:
        folder: the run directory.

    Raises:
        UserError: it cannot be written.
    """
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to out={str(folder)!r}: {error.strerror}; choose a folder that can be "
            "written"
        ) from None
    for path in [*(folder / FOLDER).glob("rank_*"), folder / FOLDER / HANG_FILE]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def hang_report(folder: Path) -> Iterator[None]:
    """Turn the failure to reach another rank into an error that says who is stalled.

    The first rank that fails writes the table of all ranks to ``heartbeat/hang.txt``.

    Args:
        folder: the run directory.

    Raises:
        HangError: a message or a collective operation failed inside.
    """
    try:
        yield
    except Exception as error:
        if not _is_communication(error):
            raise
        beats, now = read_beats(folder), time.time()
        path = folder / FOLDER / HANG_FILE
        text = summary(beats, now=now)
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            rows = table(beats, now=now)
            file.write(f"{text}\n{rows}\n")
            raise HangError(f"{text}\n{rows}") from error
        raise HangError(f"{text}; all ranks: {path}") from error


def _is_communication(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, TransferError | torch.distributed.DistError):
            return True
        # gloo's collectives raise no class of their own.
        if type(error) is RuntimeError and "gloo" in str(error):
            return True
        error = error.__cause__
    return False
