"""A SLURM cluster of two nodes on this machine, started and stopped by the tests.

Its daemons are Debian's (slurm-wlm, munge); state, sockets and logs are in a temporary folder.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_megatron.launch.port import reserved_port

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
SchedulerParameters=bf_interval=1,sched_interval=2
KillWait=5
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Cluster:
    """Where its files are, and the environment in which SLURM's commands find it.

    Attributes:
        daemons: by their command's last word: of a slurmd, the node's name.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen]
    environment: dict[str, str]

    def start(self, *command: str) -> None:
        """Start a daemon, or start it again."""
        log = self.folder / f"{command[0]}-{command[-1].strip('-/')[-4:]}.log"
        self.daemons[command[-1]] = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=log.open("a")
        )
        time.sleep(0.5)

    def lose_node(self, node: str, job: str) -> None:
        """Kill all that a node runs of a job, and its slurmd: as far as can be, a power cut."""
        tasks = processes(f"SLURMD_NODENAME={node}", f"SLURM_JOB_ID={job}")
        assert tasks, f"{node} runs nothing of job {job}"
        parents = {int(Path(f"/proc/{task}/stat").read_text().split()[3]) for task in tasks}
        steps = {
            parent
            for parent in parents
            if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd"
        }
        assert steps
        for process in (self.daemons[node].pid, *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.daemons[node].wait()

    def command(self, *words: str) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        return "\n".join(
            f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log")
        )


def processes(*variables: str) -> list[int]:
    """The processes of this machine that have all of these in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_text(errors="replace").split("\0")
            if set(variables) <= set(environment):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Cluster]:
    """Nodes n1 and n2 in partition ``main``, up and idle.

    Raises:
        FileNotFoundError: SLURM is not installed.
    """
    missing = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name) is None]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: install slurm-wlm and munge")
    (folder / "state").mkdir()
    with (
        reserved_port() as controller,
        reserved_port() as first,
        reserved_port() as second,
        _daemons(folder, controller, (first, second)) as cluster,
    ):
        yield cluster


@contextlib.contextmanager
def _daemons(folder: Path, controller_port: int, node_ports: Sequence[int]) -> Iterator[Cluster]:
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
        for i, port in enumerate(node_ports, start=1)
    )
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            host=host,
            controller_port=controller_port,
            folder=folder,
            nodes=nodes,
            # A job's number decides its ranks' port, and other tests may have jobs on this host.
            first_job=random.randint(1, 50000),
        )
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    files = {"key-file": key, "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    munge = ["munged", "--foreground", "--force", f"--log-file={folder}/munged.log"]
    munge += [
        f"--{name}={file if name == 'key-file' else folder / f'munge.{file}'}"
        for name, file in files.items()
    ]
    commands = [
        munge,
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", n] for n in ("n1", "n2")),
    ]
    found = Cluster(folder, {}, environment)
    try:
        for command in commands:
            found.start(*command)
        deadline = time.monotonic() + 60
        while found.command("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            assert time.monotonic() < deadline, found.logs()
            time.sleep(0.5)
        yield found
        found.command("scancel", "--signal=KILL", "--full", "--user=root")
    finally:
        daemons = list(found.daemons.values())[::-1]
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
