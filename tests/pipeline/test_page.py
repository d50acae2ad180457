"""docs/pipeline.md: its pictures, its numbers and its code are what the code gives."""

import re
from pathlib import Path

import pytest

from mhc_megatron.pipeline.catalogue import CATALOGUE, generate
from mhc_megatron.pipeline.costs import costs_from_json
from mhc_megatron.pipeline.draw import to_svg
from mhc_megatron.pipeline.forecast import forecast, phase_costs_from_json
from mhc_megatron.pipeline.phases import stage_phases
from mhc_megatron.pipeline.simulate import simulate

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "pipeline.md").read_text()


@pytest.mark.parametrize("name", ["one_f_one_b", "dualpipe_v"])
def test_pictures(name: str) -> None:
    """Renewed by ``mhc-megatron simulate --ranks 4 --micro-batches 10 --out DIR``."""
    svg = to_svg(simulate(generate(name, num_ranks=4, num_mb=10)))
    assert (DOCS / "timelines" / f"{name}.svg").read_text() == svg
    assert f"](timelines/{name}.svg)" in PAGE


def test_simulated_bubbles() -> None:
    lines = []
    for name in CATALOGUE:
        timelines = [simulate(generate(name, num_ranks=p, num_mb=32)) for p in (4, 8, 16)]
        lines.append(f"| `{name}` | {' | '.join(str(max(t.bubble)) for t in timelines)} |\n")
    assert f"<!-- simulated -->\n{''.join(lines)}\n" in PAGE


def test_code_and_cost_files() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(code, {})
    costs, phase_costs = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert costs_from_json(costs).unit == "ms"
    times, slowdowns = phase_costs_from_json(phase_costs)
    phases = stage_phases([False] * 2, "all", block_ends={1, 3}, loss=False)
    pair = forecast(phases, times, slowdowns=slowdowns, rebuild=True)
    assert pair.unslowed_length < pair.length < pair.serial_length


def test_every_schedule_has_a_row() -> None:
    for name in CATALOGUE:
        assert f"| `{name}` |" in PAGE
