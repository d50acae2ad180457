"""SVG, HTML and trace of a timeline."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.schedules import costs, schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_megatron.pipeline.actions import Op
from mhc_megatron.pipeline.boxes import boxes_of
from mhc_megatron.pipeline.catalogue import generate
from mhc_megatron.pipeline.costs import Costs, StageCosts
from mhc_megatron.pipeline.draw import time_text, to_svg
from mhc_megatron.pipeline.schedule import Schedule
from mhc_megatron.pipeline.simulate import simulate
from mhc_megatron.pipeline.trace import to_chrome_trace
from mhc_megatron.report.simulation import (
    bytes_text,
    format_simulation,
    rank_rows,
    simulation_page,
)

TABLES = Path(__file__).parent / "tables"
NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_a_small_picture() -> None:
    """The file is looked at when it changes."""
    timeline = simulate(generate("zb_h1", num_ranks=2, num_mb=3))
    assert to_svg(timeline) == (TABLES / "zb_h1_2x3.svg").read_text()


@given(schedules(), st.data())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_everything_is_inside(schedule: Schedule, data: st.DataObject) -> None:
    timeline = simulate(schedule, data.draw(costs(schedule.num_stages)))
    root = ElementTree.fromstring(to_svg(timeline))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for box in root.iter(f"{NAMESPACE}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        assert x >= 0 and y >= 0
        assert x + float(box.get("width", "")) <= width + 0.1
        assert y + float(box.get("height", "")) <= height + 0.1
    for text in root.iter(f"{NAMESPACE}text"):
        assert 0 <= float(text.get("x", "")) < width and 0 < float(text.get("y", "")) < height


def _labels(svg: str) -> list[tuple[float, float]]:
    """(width of the label, width of its box) of every micro-batch number."""
    pairs = []
    pattern = re.compile(
        r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"[^>]*/>\n'
        r'<text [^>]*text-anchor="middle"( font-size="8")?[^>]*>(\d+)</text>'
    )
    for found in pattern.finditer(svg):
        size = 8 if found[2] else 10
        pairs.append((len(found[3]) * 0.56 * size, float(found[1])))
    return pairs


@pytest.mark.parametrize(("num_mb", "all_labelled"), [(8, True), (128, False), (2048, False)])
def test_labels_fit_their_boxes(num_mb: int, all_labelled: bool) -> None:
    """0.56 of the size is the width of a digit in Helvetica and its kin."""
    schedule = generate("dualpipe_v", num_ranks=4, num_mb=num_mb)
    svg = to_svg(simulate(schedule))
    labels = _labels(svg)
    assert all(label < box for label, box in labels)
    computes = sum(len(row.codes) for row in schedule.ranks)
    assert (len(labels) == computes) == all_labelled
    assert len(svg) < 500_000


def test_narrow_boxes_that_touch_are_joined() -> None:
    timeline = simulate(generate("one_f_one_b", num_ranks=2, num_mb=100))
    wide = list(boxes_of(timeline, 1, 10.0))
    assert len(wide) == 200 and all(box.action is not None for box in wide)
    (joined,) = boxes_of(timeline, 1, 0.1)
    assert [kind.op for kind in joined.kinds] == [None]
    assert (joined.left, joined.right) == (0.1, pytest.approx(30.1))
    first, second = boxes_of(simulate(generate("gpipe", num_ranks=1, num_mb=100)), 0, 0.9)
    assert first.kinds[0].op is Op.F and second.kinds[0].op is Op.B
    assert (first.left, first.right, second.right) == (
        0.0,
        pytest.approx(90.0),
        pytest.approx(270.0),
    )


def test_a_thousand_ranks_are_a_sample() -> None:
    svg = to_svg(simulate(generate("one_f_one_b", num_ranks=1000, num_mb=8)))
    assert re.findall(r">rank (\d+)</text>", svg)[:3] == ["0", "16", "32"]
    assert svg.count(">rank ") == 64 and ">rank 999<" in svg
    assert "(64 of the ranks are shown)" in svg


def test_no_time_at_all() -> None:
    nothing = Costs(default=StageCosts(forward=0, dgrad=0, wgrad=0))
    timeline = simulate(generate("gpipe", num_ranks=2, num_mb=2), nothing)
    assert timeline.bubble_fraction == 0
    assert "0.0% idle" in to_svg(timeline)
    assert "0.00%" in format_simulation(timeline)


def test_trace() -> None:
    timed = Costs(default=StageCosts(forward=2.5), unit="ms")
    timeline = simulate(generate("dualpipe_v", num_ranks=2, num_mb=4), timed)
    events = json.loads(to_chrome_trace(timeline))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["rank 0", "rank 1"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == timeline.schedule.num_actions
    assert spans[0] == {
        "name": "0F0",
        "cat": "F",
        "ph": "X",
        "pid": 0,
        "tid": 0,
        "ts": 0.0,
        "dur": 2500.0,
        "args": {"stages": [0], "micro-batches": [0]},
    }
    overlap = next(event for event in spans if event["cat"] == "overlap")
    assert (overlap["name"], overlap["args"]["stages"]) == ("(0F3;3B1)", [0, 3])
    assert max(event["ts"] + event["dur"] for event in spans) == timeline.makespan * 1000


def test_page_is_complete_in_itself() -> None:
    timeline = simulate(generate("one_f_one_b", num_ranks=4, num_mb=8))
    page = simulation_page(timeline, to_svg(timeline))
    assert page.count("<svg") == 1 and "<script" not in page
    assert not re.search(r'(?:src|href)="', page)
    for text in ("27.27%", "peak live", "rank 3", "micro-batches"):
        assert text in page
    assert page == simulation_page(timeline, to_svg(timeline))


def test_table() -> None:
    stage = StageCosts(held_bytes=3 << 29)
    timeline = simulate(generate("zb_h1", num_ranks=3, num_mb=6), Costs(default=stage, unit="ms"))
    assert format_simulation(timeline) == (TABLES / "zb_h1_3x6.txt").read_text().rstrip("\n")


def test_ranks_that_are_alike_share_a_row() -> None:
    timeline = simulate(generate("dualpipe_v", num_ranks=8, num_mb=16))
    assert [row[:2] for row in rank_rows(timeline)] == [("0 to 7", "0,15 to 7,8")]
    table = format_simulation(simulate(generate("one_f_one_b", num_ranks=100, num_mb=100)))
    assert "... 80 more" in table and table.count("\n") < 40


def test_numbers_as_people_read_them() -> None:
    assert [time_text(value, "ms") for value in (3, 3.0, 3.25, 12345.6)] == [
        "3 ms",
        "3 ms",
        "3.25 ms",
        "12,346 ms",
    ]
    assert time_text(2, "") == "2"
    sizes = [bytes_text(number) for number in (0, 1, 1023, 1024, 3 << 29, 1 << 60)]
    assert sizes == ["-", "1 B", "1023 B", "1.00 KiB", "1.50 GiB", "1024.00 PiB"]
