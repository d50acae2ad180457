"""The executed step in a run's report, beside the simulated one."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.measure import costs_of
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.timeline import Timeline
from mhc_megatron.report.html import render_report
from mhc_megatron.report.pipeline import (
    PIPELINE_FILE,
    execution_section,
    forget_execution,
    read_execution,
    write_execution,
)
from mhc_megatron.report.run import load_run

COSTS = Costs(default=StageCosts(forward=2, dgrad=3, wgrad=1), unit="ms")


@pytest.fixture
def simulated() -> Timeline:
    return simulate(generate("dualpipe_v", num_ranks=2, num_mb=6), COSTS)


def write(folder: Path, timeline: Timeline) -> None:
    ranks = range(timeline.schedule.num_ranks)
    spans = [[(7 + s.start / 1e3, 7 + s.end / 1e3) for s in timeline.spans(rank)] for rank in ranks]
    write_execution(folder, timeline.schedule, step=12, spans=spans)


def test_what_is_written_is_read(simulated: Timeline, tmp_path: Path) -> None:
    assert read_execution(tmp_path) is None
    write(tmp_path, simulated)
    step, executed = read_execution(tmp_path)
    assert step == 12 and executed.schedule == simulated.schedule and executed.unit == "ms"
    assert executed.makespan == pytest.approx(simulated.makespan)
    assert executed.bubble_fraction == pytest.approx(simulated.bubble_fraction)
    again = simulate(simulated.schedule, costs_of(executed))
    assert again.makespan == pytest.approx(simulated.makespan)
    forget_execution(tmp_path)
    assert read_execution(tmp_path) is None


def test_the_section_has_both_timelines_and_bubbles(simulated: Timeline) -> None:
    section = execution_section(12, simulated)
    assert section.count("<svg") == 2
    assert f"{simulated.bubble_fraction:.1%}" in section and "its step is 0.0% shorter" in section
    assert "Pipeline: dualpipe_v, step 12" in section


def test_the_report_shows_it(
    make_run: Callable[..., Path], simulated: Timeline, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    assert 'id="pipeline"' not in render_report(load_run(run))
    write(run, simulated)
    assert re.search('id="pipeline".*id="configuration"', render_report(load_run(run)), re.S)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / PIPELINE_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"pipeline.json' cannot be read .* remove it"):
        read_execution(tmp_path)
