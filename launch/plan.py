"""``mhc-megatron plan``: what a recipe will need, before it runs.

The modules behind it are imported when it is asked for.
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from mhc_megatron.errors import UserError

if TYPE_CHECKING:
    from mhc_megatron.pipeline.memory import StageSize
    from mhc_megatron.pipeline.schedule import Schedule
    from mhc_megatron.training.config import TrainConfig

_DESCRIPTION = """\
The activations of a recipe under every recompute policy of its hyper-connections: what a
micro-batch keeps in a stage, what the rebuild of a block adds, what stays for a W of its own, and
the peak of a rank under the recipe's schedule. Nothing is run.

A second table has what a micro-batch keeps under every policy: the branches' outputs, for the
branches --branch-width times C each, and the hyper-connections' coefficients. The last line says
what is not counted.
"""

_EPILOG = """\
examples:
  mhc-megatron plan memory --recipe gpt-100m
  mhc-megatron plan memory --recipe stdlib-small-pp --set model.num_layers=32 mhc.recompute=auto
"""

_HEADER = (
    *("policy", "block", "blocks", "kept", "rebuilt", "one micro-batch", "from I to W"),
    "peak of a rank",
)
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Plan(NamedTuple):
    """A policy's bytes.

    Attributes:
        policy: its name; ``*`` behind the recipe's own.
        size: of the stage with the most layers.
        peaks: of every rank, all that is counted.
    """

    policy: str
    size: "StageSize"
    peaks: list[int]

    @property
    def one(self) -> int:
        """Peak of a micro-batch that is alone in its stage, of what the policy decides: the
        formula."""
        return self.size.kept_bytes + self.size.rebuilt_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mhc-megatron plan``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["memory"], help="what to plan")
    parser.add_argument(
        "--recipe",
        default="stdlib-small",
        help="a recipe or package.module:function (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override fields, for example --set model.num_layers=32 mhc.recompute=auto",
    )
    parser.add_argument(
        "--branch-width",
        type=int,
        default=6,
        metavar="W",
        help="what a branch keeps for its own backward, in multiples of C (default: %(default)s, "
        "a dense layer with flash attention)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status.

    Raises:
        UserError: the recipe or the arguments have to change.
    """
    from mhc_megatron.pipeline.errors import ScheduleError
    from mhc_megatron.training.overrides import apply_overrides
    from mhc_megatron.training.recipes import load_recipe

    config = apply_overrides(load_recipe(args.recipe), args.overrides)
    if config.model.residual != "mhc":
        raise UserError(
            f"model.residual={config.model.residual!r} has no streams to recompute; "
            "set model.residual=mhc"
        )
    if config.mhc.variant == "single_pass":
        raise UserError(
            "mhc.variant='single_pass' has no recompute policies to compare, since a rebuild reads "
            "with the sublayer's own H_pre; set mhc.variant=two_pass"
        )
    try:
        schedule = _schedule(config)
        plans = list(_plans(config, schedule, args.branch_width))
    except ScheduleError as error:
        raise UserError(str(error)) from error
    print("\n".join(_lines(config, schedule, plans)))
    return 0


def _schedule(config: "TrainConfig") -> "Schedule":
    """The recipe's schedule; Megatron's own is 1F1B or interleaved."""
    from mhc_megatron.pipeline.catalogue import generate

    layout = config.parallel
    name, chunks = str(layout.schedule), None
    if name == "megatron":
        name = "interleaved" if layout.virtual > 1 else "one_f_one_b"
        chunks = layout.virtual if layout.virtual > 1 else None
    return generate(
        name, num_ranks=layout.pipeline, num_mb=config.num_micro_batches, num_chunks=chunks
    )


def _plans(config: "TrainConfig", schedule: "Schedule", branch_width: int) -> Iterator[Plan]:
    """Every policy: blocks of every length that all stages hold."""
    from mhc_megatron.pipeline.blocks import RecomputePolicy
    from mhc_megatron.pipeline.costs import Costs
    from mhc_megatron.pipeline.memory import StageSize
    from mhc_megatron.pipeline.simulate import simulate

    layout = config.parallel
    own = config.mhc.recompute_policy
    layers = layout.stage_layers(config.model.num_layers)
    policies = [
        RecomputePolicy(),
        *(RecomputePolicy(name="block", block=1 + block) for block in range(2 * min(layers))),
        RecomputePolicy(name="auto"),
        RecomputePolicy(name="stage"),
    ]
    for policy in policies:
        sizes = [
            StageSize(
                hidden=config.model.hidden_size,
                seq=config.model.seq_length
                // (layout.context * (layout.tensor if layout.sequence else 1)),
                micro_batch_size=config.micro_batch_size,
                num_layers=number,
                streams=config.mhc.num_streams,
                recompute_block=policy.block_of(
                    num_sublayers=2 * number, num_streams=config.mhc.num_streams
                ),
                branch_width=branch_width,
                element_bytes=_ELEMENT_BYTES[config.dtype],
                logits=config.mhc.num_logits,
                phi_parts=2 if config.dtype == "bf16" else 0,
            )
            for number in layers
        ]
        costs = {stage: size.costs() for stage, size in enumerate(sizes)}
        peaks = simulate(schedule, Costs(stages=costs)).peak_bytes.tolist()
        largest = max(sizes, key=lambda size: size.num_layers)
        yield Plan(policy.name + ("*" if policy == own else ""), largest, peaks)


def _is_shown(plan: Plan) -> bool:
    """Of the blocks those of a power of two, and the recipe's own."""
    block = plan.size.block
    return plan.policy != "block" or block & (block - 1) == 0


def _lines(config: "TrainConfig", schedule: "Schedule", plans: list[Plan]) -> Iterator[str]:
    from mhc_megatron.report.simulation import bytes_text, columns

    size = plans[0].size
    sublayers = [2 * number for number in config.parallel.stage_layers(config.model.num_layers)]
    least, most = min(sublayers), max(sublayers)
    many = str(most) if least == most else f"{least} to {most}"
    yield (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages of "
        f"{many} sublayers, {schedule.num_mb} micro-batches; n={size.streams}, "
        f"C={size.hidden}, {size.seq * size.micro_batch_size:,} tokens, {config.dtype}"
    )
    yield ""
    splits = _splits(schedule)
    rows = [
        (
            plan.policy,
            str(plan.size.block or "-"),
            str(-(-plan.size.num_sublayers // plan.size.block) if plan.size.block else "-"),
            bytes_text(plan.size.kept_bytes),
            bytes_text(plan.size.rebuilt_bytes),
            bytes_text(plan.one),
            bytes_text(plan.size.kept_bytes + plan.size.wgrad_rebuilt_bytes) if splits else "-",
            bytes_text(max(plan.peaks)),
        )
        for plan in plans
        if _is_shown(plan)
    ]
    yield from columns([_HEADER, *rows])
    yield ""
    yield from columns(list(_whatever_the_policy(size)))
    yield ""
    own = next(plan for plan in plans if plan.policy.endswith("*"))
    peaks = ", ".join(map(bytes_text, own.peaks))
    yield f"* the recipe's; peak activations by rank: {peaks}"
    lowest = min(plans, key=lambda p: (max(p.peaks), p.size.block, p.policy == "block"))
    yield (
        f"lowest peak under this schedule: {lowest.policy.rstrip('*')}"
        + (f", block {lowest.size.block}" if lowest.size.block else "")
        + "; auto is the best of a micro-batch alone in its stage"
    )
    yield f"not counted: {', '.join(_not_counted(config))}"


def _splits(schedule: "Schedule") -> bool:
    """Whether some weight gradients are an action of their own."""
    from mhc_megatron.pipeline.actions import Op
    from mhc_megatron.pipeline.rows import OPS, ops_of

    return any((ops_of(row.codes) == OPS.index(Op.W)).any() for row in schedule.ranks)


def _whatever_the_policy(size: "StageSize") -> Iterator[tuple[str, str, str]]:
    """Rows of what a micro-batch keeps besides, each with its size per sublayer."""
    from mhc_megatron.report.simulation import bytes_text

    phi = f"{size.phi_parts} x {size.num_logits} x {size.streams} C of 2 bytes, not per token"
    yield "kept by every policy", "of a sublayer", "bytes"
    yield "outputs of branches", "C", bytes_text(size.output_bytes)
    yield "branches", f"{size.branch_width} C", bytes_text(size.branch_bytes)
    yield (
        "coefficients",
        f"{size.coefficients} float32 numbers a token",
        bytes_text(size.coefficient_bytes),
    )
    yield "phi for the kernels", phi if size.phi_parts else "-", bytes_text(size.phi_bytes)


def _not_counted(config: "TrainConfig") -> Iterator[str]:
    yield "embedding, final norm, logits and loss"
    yield "gradients and what an action allocates for itself"
    if config.model.mtp_num_layers:
        yield (
            f"model.mtp_num_layers={config.model.mtp_num_layers}, whose layers keep the plain "
            "residual"
        )
    if config.parallel.overlap != "none":
        yield "branch inputs that an interleaved backward keeps to its end"
    if not config.mhc.requires_kernels:
        yield "what backend='reference' keeps more than the kernels"
