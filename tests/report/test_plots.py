"""Charts as SVG: deterministic, well-formed, and honest about what they cannot draw."""

import math
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from mhc_megatron.report.curves import Curve
from mhc_megatron.report.plots import (
    BLUE,
    GREY,
    VERMILLION,
    Line,
    line_chart,
    spread,
    variant_colours,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def line(*values: float, label: str = "line", window: int = 1) -> Line:
    steps = list(range(1, len(values) + 1))
    return Line(
        curve=Curve(steps=steps, values=list(values)), colour=BLUE, label=label, window=window
    )


def test_the_same_input_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = line_chart("chart", [line(1, 2, 3)], title="Loss")
    # A user's own matplotlib settings have no say.
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    assert line_chart("chart", [line(1, 2, 3)], title="Loss") == first


def test_a_chart_shows_its_title_labels_and_references_and_links_nowhere() -> None:
    svg = line_chart(
        "chart", [line(1, 3, label="a < b")], title="x & y", references=((2.0, "bound 2"),)
    )
    assert {"x & y", "a < b", "bound 2", "step"} <= set(texts(svg))
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "x & y"
    assert root.get("width") is None and root.get("viewBox") is not None
    assert svg.count("http") == svg.count('xmlns="http') + svg.count('xmlns:xlink="http')


def test_identifiers_of_two_charts_differ() -> None:
    def identifiers(name: str) -> set[str]:
        svg = line_chart(name, [line(1, 2)], title="same")
        return {node.get("id", "") for node in ElementTree.fromstring(svg).iter()} - {""}

    assert identifiers("one") and not identifiers("one") & identifiers("two")


@pytest.mark.parametrize("log", [None, True, False])
@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        (),
        (1.0,),
        (0.0, 0.0),
        (math.nan, math.nan),
        (math.inf, -math.inf, 1.0),
        (1e308, 1e-308, 1.0),
        (-1.0, 1.0),
        (1e20, 1e21),
        tuple(range(100)),
    ],
    ids=lambda values: f"{len(values)} from {values[0]}" if values else "none",
)
def test_any_values_can_be_drawn(
    values: tuple[float, ...], from_zero: bool, log: bool | None
) -> None:
    lines = [line(*values, window=3 if len(values) > 3 else 1)]
    references = ((1.0, ""), (2.0, "two"))
    svg = line_chart(
        "chart", lines, title="any", references=references, log=log, from_zero=from_zero
    )
    ElementTree.fromstring(svg)
    assert ("nothing recorded" in texts(svg)) == (not values)


def test_values_that_cannot_be_drawn_are_counted() -> None:
    linear = line_chart("chart", [line(1, math.nan, 0, math.inf)], title="t", log=False)
    assert "step (2 of 4 values are not finite)" in texts(linear)
    logarithmic = line_chart("chart", [line(1, math.nan, 0, math.inf)], title="t", log=True)
    assert "step (3 of 4 values are 0 or not finite)" in texts(logarithmic)


def test_the_axis_turns_logarithmic_where_a_linear_one_hides_small_values() -> None:
    assert "1000" in texts(line_chart("chart", [line(1, 10, 1000)], title="t"))
    assert "600" in texts(line_chart("chart", [line(100, 600)], title="t"))


def test_long_labels_are_shortened() -> None:
    svg = line_chart("chart", [line(1, 2, label="a-variant-with-a-long-name")], title="t")
    assert "a-variant-with-a-…" in texts(svg)


def test_labels_move_apart_as_little_as_needed() -> None:
    assert spread([], gap=0.1) == []
    assert spread([0.2, 0.8], gap=0.1) == [0.2, 0.8]
    # Three that coincide stand around their place; at an edge they stay inside.
    assert spread([0.5, 0.5, 0.5], gap=0.125) == [0.375, 0.5, 0.625]
    assert spread([0.0, 0.0], gap=0.125) == [0.0, 0.125]
    assert spread([1.0, 1.0], gap=0.125) == [0.875, 1.0]


def test_variants_keep_their_colours() -> None:
    assert variant_colours(["plain", "hc", "mhc"]) == {"plain": GREY, "hc": VERMILLION, "mhc": BLUE}
    assert variant_colours(["mhc", "x"])["mhc"] == BLUE
    many = variant_colours(["mhc", "identity", "permutation", "sinkhorn_v4", "hc"])
    assert len(set(many.values())) == 5
