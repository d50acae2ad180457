"""How a run is spread over processes, and its checks that need no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.fp8_size import BLOCK
from mhc_megatron.pipeline.phases import OverlapMode

PipelineSchedule = Literal["megatron", "gpipe", "one_f_one_b", "zb_h1", "dualpipe_v", "dualpipe"]

MessageFormat = Literal["model", "fp8"]


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
        overlap: of a forward and a backward, where ``dualpipe_v`` and ``dualpipe`` pair them.
            ``none`` runs one after the other; the others interleave their phases, with what follows
            an MLP (``post``), the rebuilds of ``mhc.recompute`` (``recompute``), or both (``all``)
            on a stream of high priority.
        messages: what pipeline stages send each other: the state and its gradient as the model
            computes them (``model``), or rounded to e4m3 in blocks of 128 at every hop between
            ranks (``fp8``), with half of bf16's bytes and other losses.
        first_stage_layers, last_stage_layers: layers of the model's first and last stage, for
            example fewer beside the embedding or the loss; None for as many as the others. Megatron
            calls them ``num_layers_in_first_pipeline_stage`` and ``_last_``.
        sequence: sequence parallelism (needs ``tensor`` > 1).
        distributed_optimizer: shard the optimizer states over data-parallel ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    schedule: PipelineSchedule = "megatron"
    overlap: OverlapMode = "none"
    messages: MessageFormat = "model"
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
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
        self._check_overlap()
        self._check_messages()
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) is None:
                continue
            require_positive("parallel", self, name)
            if self.pipeline < 2 or self.virtual > 1:
                raise UserError(
                    f"parallel.{name}={getattr(self, name)} needs parallel.pipeline > 1 and "
                    "parallel.virtual=1; leave it out"
                )
        if (self.data * self.context) % self.expert:
            raise UserError(
                f"parallel.expert={self.expert} does not divide parallel.data * parallel.context "
                f"= {self.data * self.context}"
            )

    def _check_overlap(self) -> None:
        known = get_args(OverlapMode)
        if self.overlap not in known:
            raise UserError(f"parallel.overlap={self.overlap!r} is not one of {', '.join(known)}")
        if self.overlap != "none" and not self.pairs:
            raise UserError(
                f"parallel.overlap={self.overlap!r} with parallel.schedule={self.schedule!r}, "
                "which pairs no forward with a backward; use dualpipe_v or dualpipe, or "
                "parallel.overlap='none'"
            )

    def _check_messages(self) -> None:
        known = get_args(MessageFormat)
        if self.messages not in known:
            raise UserError(f"parallel.messages={self.messages!r} is not one of {', '.join(known)}")
        if self.messages == "fp8" and self.schedule == "megatron":
            raise UserError(
                "parallel.messages='fp8' with parallel.schedule='megatron', whose messages are "
                "Megatron's own; use another parallel.schedule, or parallel.messages='model'"
            )

    def check_message_width(self, width: int) -> None:
        """Raise a UserError unless a token's numbers in a message fill whole blocks.

        Args:
            width: hidden size times what ``TrainConfig.hidden_parts`` says.
        """
        if self.messages == "fp8" and width % BLOCK:
            raise UserError(
                f"parallel.messages='fp8' rounds blocks of {BLOCK} numbers, and a token has "
                f"{width} in a message; change model.hidden_size or mhc.num_streams, or use "
                "parallel.messages='model'"
            )

    def check_overlap(self, *, recompute: str, policy: str | None) -> None:
        """Raise a UserError if the layers leave ``overlap`` nothing to do, or no way to do it.

        Args:
            recompute: of TrainConfig.
            policy: ``mhc.recompute``; None with the plain residual.
        """
        where = f"parallel.overlap={self.overlap!r}"
        if self.overlap == "none":
            return
        if policy is None:
            raise UserError(
                f"{where} interleaves the phases of hyper-connections' layers, and "
                "model.residual='plain' has none; set parallel.overlap='none'"
            )
        if recompute == "full":
            raise UserError(
                f"{where} with recompute='full': a checkpointed layer runs its whole backward at "
                "once; use recompute='none' and mhc.recompute='auto'"
            )
        if self.overlap != "post" and policy == "none":
            raise UserError(
                f"{where} with mhc.recompute='none' has no rebuild to run ahead; use "
                "parallel.overlap='post', or mhc.recompute='auto'"
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
        # Two stages on one rank pair forwards with backwards, for an overlap without a pipeline.
        if self.pipeline < 2 and name != "dualpipe_v":
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

    def check_layers(self, num_layers: int) -> None:
        """Raise a UserError unless the stages between the first and the last are alike."""
        ends = [n for n in (self.first_stage_layers, self.last_stage_layers) if n is not None]
        layers, stages = num_layers - sum(ends), self.num_stages - len(ends)
        if not ends and layers % stages:
            chunks = "2 (dualpipe_v)" if self.schedule == "dualpipe_v" else "parallel.virtual"
            raise UserError(
                f"model.num_layers={num_layers} is not divisible by parallel.pipeline * {chunks} "
                f"= {self.num_stages}; change it, or set parallel.first_stage_layers or "
                "parallel.last_stage_layers"
            )
        if ends and (layers if stages == 0 else layers < stages or layers % stages):
            raise UserError(
                f"parallel.first_stage_layers={self.first_stage_layers} and "
                f"parallel.last_stage_layers={self.last_stage_layers} leave {layers} of "
                f"model.num_layers={num_layers} for {stages} other stages, which take equally "
                "many; change one of the three"
            )

    def check_micro_batches(self, num_micro_batches: int) -> None:
        """Raise a UserError unless ``schedule`` can run a step of so many micro-batches."""
        if not self.pairs:
            return
        if num_micro_batches % self.num_copies:
            raise UserError(
                f"{num_micro_batches} micro-batches per step are an odd number, and "
                f"{self.schedule} sends a half in each direction; change global_batch_size"
            )
        if num_micro_batches < 2 * self.pipeline:
            raise UserError(
                f"{num_micro_batches} micro-batches per step are below "
                f"2 * parallel.pipeline = {2 * self.pipeline}, which {self.schedule} "
                "needs; raise global_batch_size, lower micro_batch_size, or use "
                "parallel.schedule=zb_h1"
            )

    def check_prediction_layers(self, mtp_num_layers: int | None) -> None:
        """Raise a UserError if Megatron's MTP layers have no place under ``schedule``."""
        if self.pairs and mtp_num_layers is not None:
            raise UserError(
                f"model.mtp_num_layers={mtp_num_layers} under {self.schedule}: "
                "Megatron builds these layers, and adds up their embedding's gradient, on the "
                "last pipeline rank, but the last stage is on the first; use another "
                "parallel.schedule"
            )

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage of a model that passes ``check_layers``."""
        first, last = self.first_stage_layers, self.last_stage_layers
        ends = [layers for layers in (first, last) if layers is not None]
        others = self.num_stages - len(ends)
        each = (num_layers - sum(ends)) // others if others else 0
        return (
            *([] if first is None else [first]),
            *[each] * others,
            *([] if last is None else [last]),
        )

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule computes weight gradients apart from those of the inputs."""
        return self.pairs or self.schedule == "zb_h1"

    @property
    def pairs(self) -> bool:
        """Whether the schedule pairs forwards with backwards, from both ends of the model."""
        return self.schedule in ("dualpipe_v", "dualpipe")

    @property
    def num_copies(self) -> int:
        """How often a pipeline holds every stage: twice under bidirectional DualPipe."""
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def world_size(self) -> int:
        """Number of processes: TP x PP x CP x DP."""
        return self.tensor * self.pipeline * self.context * self.data
