"""What a job asks of a cluster, and the checks of its fields that need none. Pure."""

import re
from dataclasses import dataclass, fields

from mhc_megatron.errors import UserError
from mhc_megatron.launch.slurm.placement import Placement
from mhc_megatron.launch.slurm.variables import Variable

# What an #SBATCH line can hold without quotes, whatever the shell.
_PLAIN = re.compile(r"[A-Za-z0-9._+@%/:,=\[\]-]+")
# What pyxis takes, without quotes: [USER@][REGISTRY#]IMAGE[:TAG], or the path of a squashfs file.
_IMAGE = re.compile(
    r"((docker|dockerd|podman)://)?([A-Za-z0-9._-]+@)?([A-Za-z0-9.-]+(:\d+)?#)?"
    r"[A-Za-z0-9._/-]+(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]+)?"
)
_TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}")
_SET_BY_THE_JOB = ("MASTER_ADDR", "MASTER_PORT")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Site:
    """How one cluster is asked; None leaves a choice to it.

    Attributes:
        partition, account, qos: names of the cluster.
        time: limit of the job, SLURM's format, such as ``24:00:00`` or ``2-00``.
        cores: per rank.
        gpus: ranks have a GPU each.
        warning_seconds: before the limit, ranks are told to save and to be queued again.
        requeue: the job is queued again after a preemption, a lost node or the limit.
        exclude: names of nodes not to use.
        modules: loaded before the run.
        container: image for srun's pyxis plug-in, ``[USER@][REGISTRY#]IMAGE[:TAG]`` or the absolute
            path of a squashfs file.
        mounts: what the container sees, ``SRC:DST``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    cores: int | None = None
    gpus: bool = True
    warning_seconds: int = 180
    requeue: bool = True
    exclude: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    container: str | None = None
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and field.name != "container":
                    _require_plain(field.name, text)
        if self.container is not None:
            _require_image(self.container)
        if self.mounts and self.container is None:
            raise UserError(f"--mounts={' '.join(self.mounts)} needs --container")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(
                f"--time={self.time!r} is not SLURM's days-hours:minutes:seconds; for example "
                "24:00:00 or 2-00"
            )
        for name, least in (("cores", 1), ("warning_seconds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')}={value} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the batch script is made of.

    Attributes:
        name: of the job.
        site: how the cluster is asked.
        placement: nodes and ranks.
        variables: the environment of the ranks.
        out: the run's folder, absolute; logs and the requeue request are in ``<out>/slurm``.
        command: a rank's program and arguments.
        preflight: a rank's program before that, which gets ``--out`` and ``--unfit``; empty for
            none.
        max_left_out: nodes that the job leaves out by itself because they are not fit.
        sweep: for each task of an array, arguments after ``command``; empty for one job.
        sweep_outs: for each of these the run's folder.
    """

    name: str
    site: Site
    placement: Placement
    variables: tuple[Variable, ...]
    out: str
    command: tuple[str, ...]
    preflight: tuple[str, ...] = ()
    max_left_out: int = 4
    sweep: tuple[tuple[str, ...], ...] = ()
    sweep_outs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_plain("out", self.out)
        _require_plain("name", self.name)
        if self.max_left_out < 0:
            raise UserError(f"--max-left-out={self.max_left_out} must be at least 0")
        if not self.out.startswith("/"):
            raise UserError(f"out={self.out!r} must be absolute: every node resolves it by itself")
        for variable in self.variables:
            if not _NAME.fullmatch(variable.name):
                raise UserError(f"--env {variable.name!r} is not the name of a variable")
            if variable.name in _SET_BY_THE_JOB:
                raise UserError(
                    f"--env {variable.name}: the job sets it, from its first node and its number; "
                    "leave it out"
                )
            if "\n" in variable.value:
                raise UserError(f"--env {variable.name}: a value of one line is needed")


def _require_image(text: str) -> None:
    """An image as pyxis takes it; srun gets it as a word of a shell's line, quoted."""
    is_path = text.startswith("/")
    if is_path:
        _require_plain("container", text)
    if not is_path and (not _IMAGE.fullmatch(text) or text.endswith(".sqsh")):
        raise UserError(
            f"--container={text!r} is no image of pyxis; name [USER@][REGISTRY#]IMAGE[:TAG], such "
            "as nvcr.io#nvidia/pytorch:25.06-py3, or the absolute path of a .sqsh file"
        )


def _require_plain(name: str, text: str) -> None:
    """Text for an #SBATCH line, which is split by rules of its own and not by the shell."""
    if not _PLAIN.fullmatch(text) or text.startswith("-"):
        raise UserError(
            f"--{name.replace('_', '-')}={text!r}: only letters, digits and ._+@%/:,=[]- are "
            "passed on to sbatch, and no - comes first; choose another name"
        )
