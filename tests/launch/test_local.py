"""Ranks on one machine: what they are told, whose words are shown, and that none survives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.launch.local import launch_local

# Each rank executes the argument of its number. Results go to files, pids for the test to watch.
_JOB = """\
import json, os, signal, subprocess, sys, time
from pathlib import Path

folder, rank = Path(os.environ["JOB_FOLDER"]), int(os.environ["RANK"])

def note(name, value):
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(value))
    partial.rename(folder / name)

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)

note(f"pid{rank}", os.getpid())
exec(sys.argv[1 + rank])
"""
# The tests may run in the background or under nohup, where signals are ignored, also by children.
_DRIVER = """\
import json, signal, sys
from mhc_megatron.launch.local import launch_local
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
codes, grace = json.loads(sys.argv[1])
sys.exit(launch_local("job", codes, num_processes=len(codes), grace_seconds=grace))
"""
_HANG = "signal.pause()"
_PATIENCE = 60.0  # seconds; only a defect, or a machine that stands still, takes as long


class Job:
    """``launch_local`` in a process of its own, as the command line runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver: subprocess.Popen[str] | None = None
        (folder / "job.py").write_text(_JOB)

    def start(self, *codes: str, grace: float = 10.0, **variables: str) -> None:
        self.driver = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, json.dumps([codes, grace])],
            env={
                **{key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
                "PYTHONPATH": str(self.folder),
                "JOB_FOLDER": str(self.folder),
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> tuple[int, str, str]:
        assert self.driver is not None
        out, err = self.driver.communicate(timeout=_PATIENCE)
        return self.driver.returncode, out, err

    def run(self, *codes: str, grace: float = 10.0, **variables: str) -> tuple[int, str, str]:
        self.start(*codes, grace=grace, **variables)
        return self.finish()

    def noted(self, name: str) -> object:
        eventually(lambda: (self.folder / name).exists())
        return json.loads((self.folder / name).read_text())

    def all_gone(self) -> bool:
        return all(gone(json.loads(path.read_text())) for path in self.folder.glob("pid?"))


def gone(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] in ("", "Z")  # a zombie waits for its parent, not for us


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    assert job.all_gone()


def test_every_rank_learns_its_place(job: Job) -> None:
    code = "note(f'env{rank}', dict(os.environ)); print('out', rank)"
    status, out, err = job.run(code, code)
    assert (status, out, err) == (0, "out 0\n", "")
    first, second = job.noted("env0"), job.noted("env1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    for number, environment in enumerate((first, second)):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(number)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_thread_count_that_is_set_stays(job: Job) -> None:
    job.run("note('threads', os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="7")
    assert job.noted("threads") == "7"


def test_ranks_meet_at_the_reserved_port(job: Job) -> None:
    code = (
        "import torch.distributed as d; d.init_process_group('gloo'); d.barrier(); "
        "note(f'size{rank}', d.get_world_size()); d.destroy_process_group()"
    )
    status, _, err = job.run(code, code, OMP_NUM_THREADS="1")
    assert status == 0, err
    assert job.noted("size0") == job.noted("size1") == 2


_REFUSE = "print('mhc-megatron: error: steps=0', file=sys.stderr); sys.exit(2)"


def test_a_user_error_of_all_ranks_is_one_line(job: Job) -> None:
    status, out, err = job.run("wait_for('refused'); " + _REFUSE, "note('refused', 1); " + _REFUSE)
    assert (status, out, err) == (2, "", "mhc-megatron: error: steps=0\n")


def test_a_user_error_of_one_rank_ends_the_others(job: Job) -> None:
    status, _, err = job.run(_HANG, _REFUSE)
    assert status == 2
    assert err == "[rank 1] mhc-megatron: error: steps=0\n[rank 1] failed first: exit status 2\n"


def test_a_silent_failure_is_named(job: Job) -> None:
    assert job.run(_HANG, _HANG, "sys.exit(5)") == (5, "", "[rank 2] failed first: exit status 5\n")


def test_the_traceback_of_the_failing_rank_is_shown_once(job: Job) -> None:
    status, _, err = job.run(_HANG, "raise ValueError('boom')", _HANG)
    assert status == 1
    assert err.count("[rank 1] Traceback (most recent call last):\n") == 1
    assert err.endswith("[rank 1] ValueError: boom\n[rank 1] failed first: exit status 1\n")


def test_rank_zero_speaks_for_itself(job: Job) -> None:
    status, _, err = job.run("raise ValueError('boom')", _HANG)
    assert status == 1
    assert err.count("ValueError: boom") == 1 and "[rank" not in err


def test_a_rank_that_fails_beside_rank_zero_is_mentioned(job: Job) -> None:
    # Rank 1 raises first, as when its connection closes, but takes longer to end.
    ends_late = (
        "import atexit; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "atexit.register(lambda: wait_for('ended')); note('raised', 1); raise ValueError('cause')"
    )
    ends_early = "wait_for('raised'); note('ended', 1); os._exit(1)"
    status, _, err = job.run(ends_early, ends_late)
    assert status == 1
    assert err == "[rank 1] failed next, exit status 1: ValueError: cause\n"


@pytest.mark.parametrize("number", [0, 1])
def test_death_by_a_signal_is_named(job: Job, number: int) -> None:
    codes = [_HANG, _HANG]
    codes[number] = "os.kill(os.getpid(), signal.SIGKILL)"
    status, _, err = job.run(*codes)
    assert status == 128 + signal.SIGKILL
    assert f"[rank {number}] " in err and err.endswith("killed by SIGKILL\n")


def test_only_the_end_of_a_long_stderr_is_kept(job: Job) -> None:
    status, _, err = job.run(_HANG, "sys.stderr.write('x' * 10**6 + '\\nlast\\n'); sys.exit(1)")
    assert status == 1
    assert len(err) < 70_000 and "[rank 1] last\n" in err


def test_a_peer_that_ignores_sigterm_is_killed(job: Job) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('deaf', 1); signal.pause()"
    status, _, _ = job.run(deaf, "wait_for('deaf'); sys.exit(3)", grace=0.2)
    assert status == 3


def test_a_rank_that_ends_well_ends_nobody(job: Job) -> None:
    job.run(
        "wait_for('pid1'); pid = json.loads((folder / 'pid1').read_text())\n"
        "while Path(f'/proc/{pid}').exists(): time.sleep(0.01)\n"
        "note('after', 1)",
        "pass",
    )
    assert job.noted("after") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_every_rank(job: Job, number: signal.Signals) -> None:
    code = (
        f"signal.signal({int(number)}, lambda *_: (note(f'got{{rank}}', 1), sys.exit(7))); "
        "note(f'ready{rank}', 1); signal.pause()"
    )
    job.start(code, code)
    assert job.noted("ready0") == job.noted("ready1") == 1
    job.driver.send_signal(number)
    assert job.finish() == (7, "", "")
    assert job.noted("got0") == job.noted("got1") == 1


def test_a_second_signal_kills(job: Job) -> None:
    deaf = (
        "signal.signal(signal.SIGINT, lambda *_: note('once', 1)); note('ready', 1)\n"
        "while True: signal.pause()"
    )
    job.start(deaf)
    job.noted("ready")
    job.driver.send_signal(signal.SIGINT)
    job.noted("once")
    job.driver.send_signal(signal.SIGINT)
    assert job.finish() == (128 + signal.SIGKILL, "", "")


def test_ranks_die_with_the_launcher(job: Job) -> None:
    job.start(_HANG, _HANG)
    job.noted("pid0"), job.noted("pid1")
    job.driver.kill()
    job.finish()
    eventually(job.all_gone)


def test_what_a_rank_started_ends_with_it(job: Job) -> None:
    code = "note('pid9', subprocess.Popen(['sleep', '1000']).pid); sys.exit(4)"
    assert job.run(_HANG, code)[0] == 4
    eventually(lambda: gone(job.noted("pid9")))


def test_handlers_are_put_back_and_ignored_signals_stay_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.py").write_text(
        "import signal, sys; sys.exit(signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch_local("job", [], num_processes=1) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert [signal.getsignal(number) for number in numbers] == before


def test_no_process_is_refused() -> None:
    with pytest.raises(UserError, match="num_processes=0 must be at least 1"):
        launch_local("job", [], num_processes=0)
