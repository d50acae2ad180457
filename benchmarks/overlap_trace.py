"""What of a profiled pair is hidden: of mHC on the priority lane, of all mHC, of the exchanges."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhc_megatron.report.gpu_kinds import Kind
from mhc_megatron.report.gpu_trace import Work, read_trace
from mhc_megatron.report.overlap import Exposure, measure
from mhc_megatron.report.trace_svg import to_svg

_WAIT = "spin_kernel"  # torch.cuda._sleep's


def name_exchanges(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace with the waits of exchanges named as communication."""
    for event in trace["traceEvents"]:
        if "stream" in event.get("args", {}) and _WAIT in event["name"]:
            event["name"] = "nccl wait of an exchange"
    return trace


def split(work: list[Work]) -> tuple[list[Work], list[Work]]:
    """mHC beside the compute lane, and all mHC; the compute lane is the one that computes most."""
    busy: Counter[int] = Counter()
    for item in work:
        if item.kind is Kind.COMPUTE:
            busy[item.stream] += item.end - item.start
    compute = busy.most_common(1)[0][0]
    mhc = [item for item in work if item.kind is Kind.MHC]
    return [item for item in mhc if item.stream != compute], mhc


def hidden_lines(path: Path, picture: Path | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Lines of a trace, without what they share with the pair's, each with its text.

    Args:
        path: of the trace, which is written anew with the exchanges named.
        picture: where it is drawn; None for nowhere.
    """
    path.write_text(json.dumps(name_exchanges(json.loads(path.read_text()))))
    work = read_trace(path).work
    everything = measure(work, work)
    if picture is not None:
        picture.write_text(to_svg(work, everything.lanes))
    beside, mhc = split(work)
    exchanges = everything.kinds[Kind.COMMUNICATION]
    parts = [
        ("hidden_mhc_beside", measure(beside, work).kinds[Kind.MHC] if beside else None),
        ("hidden_mhc", measure(mhc, work).kinds[Kind.MHC] if mhc else None),
        ("hidden_exchanges", exchanges if exchanges.total else None),
    ]
    for metric, found in parts:
        if found is None:
            continue
        line = _line(metric, found)
        yield line, f"{metric}: {line['value']:.1f} % of {line['total']:.3f} ms"


def _line(metric: str, found: Exposure) -> dict[str, Any]:
    return {
        "metric": metric,
        "value": round(100 * found.hidden / found.total, 2),
        "unit": "%",
        "total": round(found.total / 1e6, 3),
    }
