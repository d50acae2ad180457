"""An executed pipeline step beside the simulated one: pipeline.json and its part of the report.

``pipeline.json`` has the ``step``, the ``schedule``'s name, its ``csv`` (docs/pipeline.md), and
``spans``: for every rank, start and end of each action in seconds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.costs import StageCosts
from mhc_megatron.pipeline.draw import time_text, to_svg
from mhc_megatron.pipeline.measure import Spans, costs_of, timeline_of
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.text import from_csv, to_csv
from mhc_megatron.pipeline.timeline import Timeline
from mhc_megatron.report import page
from mhc_megatron.report.metrics import replace_file

PIPELINE_FILE = "pipeline.json"
_HEADER = ("stage", "F", "B", "I", "W", "F&B")


def write_execution(
    folder: Path | str, schedule: Schedule, *, step: int, spans: Sequence[Spans]
) -> None:
    """Write pipeline.json.

    Args:
        folder: the run directory.
        schedule: what ran.
        step: steps done, as in the metrics.
        spans: of every rank, one per action, in seconds.
    """
    content = {"step": step, "schedule": schedule.name, "csv": to_csv(schedule), "spans": spans}
    replace_file(Path(folder) / PIPELINE_FILE, json.dumps(content) + "\n")


def forget_execution(folder: Path | str) -> None:
    """Remove an earlier run's pipeline.json."""
    (Path(folder) / PIPELINE_FILE).unlink(missing_ok=True)


def read_execution(folder: Path | str) -> tuple[int, Timeline] | None:
    """The step and its timeline in ms; None where the run has none.

    Raises:
        UserError: the file is not what ``write_execution`` writes.
    """
    path = Path(folder) / PIPELINE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schedule = from_csv(content["csv"], name=content["schedule"])
        spans = [[(start, end) for start, end in rank] for rank in content["spans"]]
        return content["step"], timeline_of(schedule, spans)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error!r}); remove it") from error


def execution_section(step: int, executed: Timeline) -> str:
    """HTML: the executed timeline, the one that the simulator makes of its medians, and both's
    bubbles."""
    costs = costs_of(executed)
    simulated = simulate(executed.schedule, costs)
    off = simulated.makespan / executed.makespan - 1 if executed.makespan else 0.0
    rows = [
        ("executed", *_summary(executed)),
        ("simulated", *_summary(simulated)),
    ]
    stages = costs.of_stages(executed.schedule.num_stages)
    return page.section(
        "pipeline",
        f"Pipeline: {executed.schedule.name}, step {step:,}",
        page.paragraph(
            "Executed: every action as it was measured on its rank, whose clock starts at a "
            "barrier. Simulated: the same schedule with the medians of those times for each stage "
            f"and operation, and messages that take no time; its step is {abs(off):.1%} "
            f"{'longer' if off > 0 else 'shorter'}."
        ),
        page.numbers(("", "step", "bubble"), rows, colours=["transparent"] * 2),
        page.wide(to_svg(executed), caption="Executed."),
        page.wide(to_svg(simulated), caption="Simulated."),
        page.paragraph("Medians of a micro-batch in ms; F&B is an overlap with that backward."),
        page.numbers(
            _HEADER,
            [(str(number), *_medians(stage)) for number, stage in enumerate(stages)],
            colours=["transparent"] * len(stages),
        ),
    )


def _summary(timeline: Timeline) -> tuple[str, str]:
    return time_text(timeline.makespan, timeline.unit), f"{timeline.bubble_fraction:.1%}"


def _medians(stage: StageCosts) -> list[str]:
    times = (stage.forward, stage.backward, stage.dgrad, stage.wgrad, stage.overlap)
    return [f"{time:.1f}" if time else "-" for time in times]
