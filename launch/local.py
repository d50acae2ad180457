"""The processes of one run on this machine: start them, watch them, leave none behind.

torchrun would start them as well. It is not used because a user's mistake must stay one line with
an exit status of its own: the elastic agent adds a traceback and a table, turns every status into
1, and imports torch once more before the first rank starts. Restarts and rendezvous over nodes,
what the agent is for, have no use on one machine; ``mhc_megatron.launch.environment`` reads what
torchrun sets, so that it can start a run over several.
"""

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mhc_megatron.errors import UserError
from mhc_megatron.launch.port import reserved_port

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_USER_ERROR = 2  # the exit status of mhc-megatron after a UserError
_STDERR_KEPT = 64 * 1024  # bytes per rank: the end holds the exception
_OWN_WORDS_SECONDS = 1.0  # for rank 0 to report a UserError that another rank met first
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(kw_only=True, eq=False)
class _Rank:
    """A process and the end of its stderr (empty for rank 0, which writes to the terminal)."""

    number: int
    process: subprocess.Popen[bytes]
    stderr: bytes = b""
    reader: threading.Thread | None = None

    def watch(self, events: "_Events") -> None:
        """Collect stderr and announce the exit, each in a thread."""
        if self.process.stderr is not None:
            self.reader = threading.Thread(
                target=self._read, args=(self.process.stderr.fileno(),), daemon=True
            )
            self.reader.start()
        threading.Thread(target=self._announce_exit, args=(events,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        while chunk := os.read(descriptor, 4096):
            self.stderr = (self.stderr + chunk)[-_STDERR_KEPT:]

    def _announce_exit(self, events: "_Events") -> None:
        self.process.wait()
        events.put(self)

    @property
    def status(self) -> int:
        """The exit status as a shell counts: 128 + n after signal n."""
        code = self.process.returncode
        return 128 - code if code < 0 else code

    @property
    def ending(self) -> str:
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def signal(self, number: int) -> None:
        """Signal the rank and whatever it started itself (data workers, checkpoint writers)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def lines(self) -> list[str]:
        """What is kept of stderr, once the rank has ended."""
        if self.reader is not None:
            self.reader.join(timeout=1)  # at its end unless a stranger holds the pipe open
        return self.stderr.decode(errors="replace").splitlines()


# Ranks that ended and signals that arrived. A SimpleQueue may be written in a signal handler.
_Events = queue.SimpleQueue[_Rank | int]


def launch_local(
    module: str, args: Sequence[str], *, num_processes: int, grace_seconds: float = 10.0
) -> int:
    """Run ``python -m module args`` as ranks 0 .. num_processes - 1 of one run, until all end.

    The processes learn their place as torchrun's do, from ``RANK``, ``LOCAL_RANK``,
    ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``. ``OMP_NUM_THREADS``
    shares the cores among them unless it is set already. Call it from the main thread: SIGINT,
    SIGTERM and SIGHUP go on to all ranks meanwhile.

    Rank 0 writes to this terminal. The other ranks' stdout is dropped, and of their stderr that of
    the rank that failed first is shown; a UserError (status 2), which ranks tend to raise alike,
    is left to rank 0 if it raises it as well.

    When a rank fails, the others get SIGTERM. Ranks that are left ``grace_seconds`` later, or at
    a second signal, are killed; so are all of them when this process dies (on Linux).

    Args:
        module: a module that runs under ``python -m``.
        args: its arguments.
        num_processes: ranks to start.
        grace_seconds: time to end after SIGTERM or a forwarded signal.

    Returns:
        0, or the exit status of the rank that failed first (128 + n after signal n).

    Raises:
        UserError: ``num_processes`` is below 1.
    """
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes} must be at least 1")
    events: _Events = queue.SimpleQueue()
    ranks: list[_Rank] = []
    with reserved_port() as port, _signals_into(events):
        try:
            for number in range(num_processes):
                ranks.append(_start(module, args, number, num_processes, port))
            # Threads only after the last fork.
            for rank in ranks:
                rank.watch(events)
            return _Supervision(ranks=ranks, events=events, grace_seconds=grace_seconds).run()
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.signal(signal.SIGKILL)
                    rank.process.wait()


@dataclass(kw_only=True)
class _Supervision:
    """Waits for all ranks, and sees to it that they end once one has failed.

    Attributes:
        failed: the rank that failed first.
        unprompted: it failed before any signal told it to end.
        on_request: such a signal has arrived.
        planned: signals to send to what still runs: (when, signal), soonest first.
    """

    ranks: list[_Rank]
    events: _Events
    grace_seconds: float
    failed: _Rank | None = None
    unprompted: bool = False
    on_request: bool = False
    planned: list[tuple[float, int]] = field(default_factory=list)

    def run(self) -> int:
        running = list(self.ranks)
        while running:
            try:
                event = self.events.get(timeout=self._until_next())
            except queue.Empty:
                self._send(self.planned.pop(0)[1], running)
                continue
            if isinstance(event, _Rank):
                running.remove(event)
                event.signal(signal.SIGKILL)  # what it started and left behind
                if event.status != 0 and self.failed is None:
                    self._after_failure(event)
            else:
                self._after_signal(event, running)
        if self.failed is None:
            return 0
        if self.unprompted:
            self._report(self.failed)
        return self.failed.status

    def _until_next(self) -> float | None:
        return max(0.0, self.planned[0][0] - time.monotonic()) if self.planned else None

    def _send(self, number: int, running: list[_Rank]) -> None:
        for rank in running:
            rank.signal(number)

    def _after_failure(self, rank: _Rank) -> None:
        self.failed = rank
        if self.on_request:
            return
        self.unprompted = True
        now = time.monotonic()
        if rank.number != 0 and rank.status == _USER_ERROR:
            now += _OWN_WORDS_SECONDS
        self.planned = [(now, signal.SIGTERM), (now + self.grace_seconds, signal.SIGKILL)]

    def _after_signal(self, number: int, running: list[_Rank]) -> None:
        grace = 0.0 if self.on_request else self.grace_seconds
        self.on_request = True
        self._send(number, running)
        self.planned = [(time.monotonic() + grace, signal.SIGKILL)]

    def _report(self, failed: _Rank) -> None:
        """Rank 0 has said on the terminal what it had to say, unless a signal killed it."""
        first = self.ranks[0]
        if failed is first:
            if first.process.returncode < 0:
                _say(first, first.ending)
            # Its failure may only follow another's, say from a closed connection.
            for rank in self.ranks[1:]:
                if rank.process.returncode > 0 and rank.status != _USER_ERROR:
                    _say(rank, f"failed next, {rank.ending}: {''.join(rank.lines()[-1:])}")
        elif not failed.status == first.status == _USER_ERROR:
            for line in failed.lines():
                _say(failed, line)
            _say(failed, f"failed first: {failed.ending}")


def _say(rank: _Rank, text: str) -> None:
    print(f"[rank {rank.number}] {text}", file=sys.stderr, flush=True)


def _start(module: str, args: Sequence[str], number: int, num_processes: int, port: int) -> _Rank:
    environment = {
        "OMP_NUM_THREADS": str(max(1, _num_cores() // num_processes)),
        # Not the working directory's: a checkout there would hide the installed package.
        "PYTHONSAFEPATH": "1",
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if number == 0 else subprocess.DEVNULL,
        stderr=None if number == 0 else subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C reaches a rank once, as a forwarded signal
        preexec_fn=_dies_with(os.getpid()),
    )
    return _Rank(number=number, process=process)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Something for a new process to call, so that it does not outlive ``parent``."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return ask_the_kernel


@contextlib.contextmanager
def _signals_into(events: _Events) -> Iterator[None]:
    """Signals become events; ignored ones (nohup's SIGHUP) stay ignored."""
    previous = {number: signal.getsignal(number) for number in _FORWARDED}
    handled = [number for number in _FORWARDED if previous[number] is not signal.SIG_IGN]
    try:
        for number in handled:
            signal.signal(number, lambda received, frame: events.put(received))
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])
