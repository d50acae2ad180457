"""How a run is spread over processes, and its checks that need no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from mhc_megatron.errors import UserError

PipelineSchedule = Literal["megatron", "gpipe", "one_f_one_b", "zb_h1", "dualpipe_v", "dualpipe"]


def require_positive(section: str, config: object, *names: str) -> None:
    """Raise a UserError for the first of the fields ``names`` that is below 1."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"{section}.{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout: how many ways each axis splits. The world size follows from it.

    Attributes:
        tensor, pipeline, context, expert, data: TP, PP, CP, EP and DP sizes. EP lies inside
            DP x CP (Megatron's default order), so it must divide ``data * context``.
        virtual: virtual stages (model chunks) per pipeline rank; above 1 Megatron's schedule is
            interleaved 1F1B.
        schedule: of the pipeline. ``megatron`` is Megatron's own, 1F1B or interleaved 1F1B; the
            others run on the executor of ``mhc_megatron.pipeline``. ``dualpipe_v`` cuts the model
            into two stages per pipeline rank; ``dualpipe`` runs half of the micro-batches through
            the ranks in reverse and keeps every stage on two of them.
        sequence: sequence parallelism (needs ``tensor`` > 1).
        distributed_optimizer: shard the optimizer states over data-parallel ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    schedule: PipelineSchedule = "megatron"
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence: bool = False
    distributed_optimizer: bool = False

    def __post_init__(self) -> None:
        require_positive(
            "parallel", self, "tensor", "pipeline", "virtual", "context", "expert", "data"
        )
        if self.sequence and self.tensor == 1:
            raise UserError(
                "parallel.sequence=True needs parallel.tensor > 1; set parallel.sequence=False"
            )
        if self.virtual > 1 and self.pipeline < 2:
            raise UserError(
                f"parallel.virtual={self.virtual} needs parallel.pipeline > 1; "
                "set parallel.virtual=1"
            )
        self._check_schedule()
        if (self.data * self.context) % self.expert:
            raise UserError(
                f"parallel.expert={self.expert} does not divide parallel.data * parallel.context "
                f"= {self.data * self.context}"
            )

    def _check_schedule(self) -> None:
        name = self.schedule
        if name == "interleaved":
            raise UserError(
                "parallel.schedule='interleaved' is Megatron's own; use parallel.virtual > 1 with "
                "parallel.schedule='megatron'"
            )
        known = get_args(PipelineSchedule)
        if name not in known:
            raise UserError(f"parallel.schedule={name!r} is not one of {', '.join(known)}")
        if name == "megatron":
            return
        if self.pipeline < 2:
            raise UserError(
                f"parallel.schedule={name!r} needs parallel.pipeline > 1; "
                "set parallel.schedule=megatron"
            )
        if self.virtual > 1:
            raise UserError(
                f"parallel.virtual={self.virtual} is for parallel.schedule='megatron'; "
                f"{name} has its own number of stages per rank; set parallel.virtual=1"
            )
        if self.pipeline % self.num_copies:
            raise UserError(
                f"parallel.pipeline={self.pipeline} is odd, and {name} has two directions; use "
                f"parallel.pipeline={self.pipeline + 1} or parallel.schedule=dualpipe_v"
            )

    @property
    def num_stages(self) -> int:
        """Model chunks over all pipeline ranks."""
        return self.pipeline * (2 if self.schedule == "dualpipe_v" else self.virtual)

    @property
    def num_copies(self) -> int:
        """How often a pipeline holds every stage: twice under bidirectional DualPipe."""
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def world_size(self) -> int:
        """Number of processes: TP x PP x CP x DP."""
        return self.tensor * self.pipeline * self.context * self.data
