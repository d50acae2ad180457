"""benchmarks/overlap.py: a pair in every mode has the bits of none, and what its profile hides."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core import __version__ as core_version
from packaging.version import Version

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODELS = ["tiny-dense"]
if Version(core_version) >= Version("0.17"):  # test_layouts.py: older ones refuse it without TE
    MODELS += ["tiny"]

# Compute 0-100 and 120-140; on the priority lane mHC 50-110, on the compute lane 100-120; an
# exchange waits 105-155.
EVENTS = [
    ("sm90_gemm", 0, 100, 7),
    ("mix_fwd", 50, 60, 20),
    ("mix_fwd", 100, 20, 7),
    ("void at::cuda::spin_kernel(long)", 105, 50, 21),
    ("sm90_gemm", 120, 20, 7),
]
SUMMARY = """\
import json, sys
from pathlib import Path
from overlap_trace import hidden_lines
for line, text in hidden_lines(Path(sys.argv[1]), Path(sys.argv[2])):
    print(json.dumps(line))
"""


def python(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_mode_has_the_same_bits_and_a_prediction(tmp_path: Path) -> None:
    sizes = ("--models", *MODELS, "--repetitions", "1", "--commit", "tested")
    printed = python("overlap.py", "--results", str(tmp_path), *sizes)
    assert printed.count(" 0 mismatches") == 4 * len(MODELS)
    lines = [json.loads(text) for text in (tmp_path / "overlap.jsonl").read_text().splitlines()]
    modes = ["none", "post", "recompute", "all"]
    assert [(line["shape"]["model"], line["impl"]) for line in lines] == [
        (model, f"mhc_megatron.{mode}") for model in MODELS for mode in modes
    ]
    for line in lines:
        assert line["metric"] == "pair" and line["mismatches"] == 0 and line["value"] > 0
        assert ("predicted" in line) == (line["impl"] != "mhc_megatron.none")
        assert line.get("predicted_alone", 1) > line.get("priority", 0) >= 0
        if "predicted" not in line:
            continue
        ends = [end for _, end, _ in line["steps"]]
        assert min(ends) > 0 and set(line["stretched"]) >= {"compute"}
        assert max(end for *_, end in line["steps"]) == line["predicted"]
        lanes = {"compute", "priority"}
        if line["shape"]["model"] == "tiny":
            lanes.add("communication")
        assert {lane: lanes - set(row) for lane, row in line["slowdowns"].items()} == {
            lane: {lane} for lane in lanes
        }
        factors = [factor for row in line["slowdowns"].values() for factor in row.values()]
        assert min(factors) >= 1 and line["without_pauses"] > 0
        most = max(math.prod(row.values()) for row in line["slowdowns"].values())
        longest = line["predicted_alone"] * most
        assert line["predicted_alone"] <= line["predicted"] < longest * 1.01 + 0.01  # as written


METER = """\
from overlap_slowdown import _Meter, _Work
from mhc_megatron.pipeline.lanes import Slowdowns, simulate_lanes
from mhc_megatron.pipeline.interleave import PhaseCost
from mhc_megatron.pipeline.phases import Lane, Phase, Step


class Simulated(_Meter):
    def __init__(self, slowdowns):
        self._repetitions, self._slowdowns = 3, slowdowns

    def _time(self, work, beside=None):
        rows = [(Phase(each.lane.value, each.lane),) if each else () for each in (work, beside)]
        costs = {each.lane.value: PhaseCost(*[each.calls * each.call()] * 2)
                 for each in (work, beside) if each}
        plan = [Step("F", 0), Step("B", 0)][: len(costs)]
        ends = [span.end for span in simulate_lanes(tuple(plan), *rows, costs, self._slowdowns)]
        return ends[0], max(ends[0] - ends[-1], 0.0)


pair = Lane.COMPUTE, Lane.PRIORITY
for first, second in ((1.5, 1.25), (8.0, 1.0), (1e9, 1.0), (1.0, 2.0)):
    meter = Simulated(Slowdowns({pair: first, pair[::-1]: second}))
    works = [meter.alone(_Work(lane, lambda: 3.0, calls=5)) for lane in pair]
    print(*(round(meter.factor(*order), 9) for order in (works, works[::-1])))
"""
STEPS = """\
from overlap_steps import compared
from mhc_megatron.pipeline.interleave import PhaseCost
from mhc_megatron.pipeline.lanes import simulate_lanes
from mhc_megatron.pipeline.phases import Lane, Phase, Step

forward, backward = (Phase("a"), Phase("b")), (Phase("x", Lane.COMMUNICATION),)
costs = {"a": PhaseCost(2, 0), "b": PhaseCost(4, 0), "x": PhaseCost(0, 4)}
plan = Step("F", 0), Step("B", 0), Step("F", 1)
found = dict(zip(plan, (3.0, 5.0, 9.0)))
print(compared(found, simulate_lanes(plan, forward, backward, costs), costs))
"""


@pytest.mark.one_core
def test_the_factors_of_simulated_lanes_are_found() -> None:
    """Also where the other lane ends first; a lane that stands still has the largest factor."""
    assert python("-c", METER).splitlines() == ["1.5 1.25", "8.0 1.0", "100.0 1.0", "1.0 2.0"]


@pytest.mark.one_core
def test_steps_are_compared_with_their_costs() -> None:
    """A lane's steps took 3 and 6 instead of 2 and 4, an exchange 5 instead of 4."""
    steps = "[['F a', 3.0, 2], ['B x', 5.0, 4], ['F b', 9.0, 6]]"
    stretched = "{'compute': 1.5, 'communication': 1.25}"
    printed = python("-c", STEPS)
    assert printed == f"{{'stretched': {stretched}, 'steps': {steps}}}\n"


def test_what_a_profile_hides(tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.svg"
    events = [
        {
            "ph": "X",
            "cat": "kernel",
            "name": name,
            "ts": start,
            "dur": length,
            "args": {"device": 0, "stream": stream, "correlation": number},
        }
        for number, (name, start, length, stream) in enumerate(EVENTS)
    ]
    trace.write_text(json.dumps({"traceEvents": events}))
    lines = [json.loads(x) for x in python("-c", SUMMARY, str(trace), str(picture)).splitlines()]
    # Times of both lanes count once: mHC 50-120, of which 100-105 nothing hides.
    assert lines == [
        {"metric": "hidden_mhc_beside", "value": 91.67, "unit": "%", "total": 0.06},
        {"metric": "hidden_mhc", "value": 92.86, "unit": "%", "total": 0.07},
        {"metric": "hidden_exchanges", "value": 70.0, "unit": "%", "total": 0.05},
    ]
    assert picture.read_text().count('class="lane"') == 3
