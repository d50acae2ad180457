"""Checkpoints that a forked process of every rank writes while training goes on.

Megatron's own machinery: ``dist_checkpointing.save(async_sharded_save=True)`` and
``AsyncCallsQueue``. GPU tensors are copied to the host before the fork; tensors on the host are as
they were at the fork. The process also hashes what it has written.
"""

import errno
import functools
import gc
import secrets
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from mhc_megatron.errors import UserError
from mhc_megatron.megatron.compat import own_async_writer
from mhc_megatron.training.checkpoint import SAVE_OPTIONS, Attempt, saved_state
from mhc_megatron.training.config import TrainConfig
from mhc_megatron.training.manifest import checksum, written_by

_SECONDS_BETWEEN_POLLS = 0.05


class BackgroundSave:
    """At most one checkpoint on its way. All ranks call its methods together.

    A checkpoint is published as a synchronous one is, by ``poll`` or ``finish``, once every rank
    has written its part. Both raise a UserError if a part cannot be written; nothing is left of
    that checkpoint then, and the ones before it are as they were.

    Args:
        folder: the run's checkpoint folder.
        config: the run.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self._folder, self._config = folder, config
        self._queue = AsyncCallsQueue()
        self._attempt: Attempt
        self._hashed: Connection | None = None  # from this rank's writer, where there is one

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is on its way."""
        return bool(self._queue.get_num_unfinalized_calls())

    def start(self, step: int, *, chunks: list[torch.nn.Module], optimizer: Any) -> None:
        """Begin to save model and optimizer after ``step`` steps, when no other is on its way.

        Returns once the state is safe from the next step.

        Raises:
            UserError: the folder or the first files cannot be written, as on a full disk.
        """
        assert not self.pending, "finish() the checkpoint before"
        # After a crash a writer may outlive its rank: it must not find its folder again.
        tag = [f"-{secrets.token_hex(4)}"]
        torch.distributed.broadcast_object_list(tag, src=0)
        attempt = Attempt(folder=self._folder, step=step, config=self._config, tag=tag[0])
        self._attempt, self._hashed = attempt, None
        state = saved_state(step, chunks, optimizer)
        with attempt.guarded():
            attempt.begin()
            request = dist_checkpointing.save(
                state,
                str(attempt.partial),
                async_sharded_save=True,
                **SAVE_OPTIONS,
                **own_async_writer(),
            )
            if request.async_fn is None:
                self._queue.schedule_async_request(request)
            else:
                self._hashed, send = Pipe(duplex=False)
                write = functools.partial(_write_and_hash, request.async_fn, send, attempt.partial)
                self._queue.schedule_async_request(request._replace(async_fn=write))
                send.close()  # the writer has its own

    def poll(self) -> bool:
        """Publish the checkpoint if it is written; whether none is on its way any more."""
        if not self.pending:
            return True
        with self._attempt.guarded():
            if not self._queue.maybe_finalize_async_calls():
                return False
            self._attempt.seal({} if self._hashed is None else _received(self._hashed))
        self._attempt.publish()
        return True

    def finish(self) -> None:
        """Wait until no checkpoint is on its way.

        Raises:
            UserError: also if the writers take longer than ``timeout_minutes``.
        """
        # Counted, not timed: all ranks give up after the same poll.
        for _ in range(max(1, int(self._config.timeout_minutes * 60 / _SECONDS_BETWEEN_POLLS))):
            if self.poll():
                return
            time.sleep(_SECONDS_BETWEEN_POLLS)
        raise UserError(
            f"checkpoint {self._attempt.final} was not written in the background within "
            f"timeout_minutes={self._config.timeout_minutes:g}; the checkpoints before it are "
            "intact. Raise timeout_minutes if the disk is slow, and start the run again: it "
            "resumes from the newest checkpoint"
        )

    def __enter__(self) -> "BackgroundSave":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End this rank's writer if the run fails: it would wait for it. No collective."""
        while kind is not None and self.pending:
            self._queue.async_calls.popleft().async_caller.close(abort=True)


def _write_and_hash(
    write: Callable[..., None], send: Connection, partial: Path, *arguments: Any, **options: Any
) -> None:
    """In the writer: Megatron's function (its errors have a way of their own), then checksums."""
    gc.disable()  # for good: it must not free what the rank's CUDA context owns
    write(*arguments, **options)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        send.send(
            {
                path.name: checksum(path)
                for path in partial.glob("*.distcp")
                if written_by(path.name, rank=rank, world_size=world_size)
            }
        )
    except OSError as error:
        send.send(error)


def _received(hashed: Connection) -> dict[str, str]:
    """The checksums that this rank's writer has sent before it ended.

    Raises:
        OSError: that of the writer, or that it ended before it sent anything.
    """
    try:
        found: dict[str, str] | OSError = hashed.recv()
    except EOFError:
        raise ChildProcessError(errno.ECHILD, "the background writer was killed") from None
    finally:
        hashed.close()
    if isinstance(found, OSError):
        raise found
    return found
