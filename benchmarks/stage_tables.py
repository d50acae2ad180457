"""Tables of stages and pipelines, made from results files: those of docs/fp8.md and pipeline.md.

    python benchmarks/stage_tables.py benchmarks/results/h100/te_blocks.jsonl
    python benchmarks/stage_tables.py benchmarks/results/h200/fp8_training.jsonl
    python benchmarks/stage_tables.py benchmarks/results/cpu/message_training.jsonl
    python benchmarks/stage_tables.py benchmarks/results/h200/multigpu.jsonl
    python benchmarks/stage_tables.py benchmarks/results/h200/overlap.jsonl
    python benchmarks/stage_tables.py benchmarks/results/h200/step_graph.jsonl

Of a figure that was measured twice the last counts.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from kernel_table import Line, markdown, results, with_fused_attention
from multigpu_plot import PLAIN, bandwidths, experts, scaling, steps

_PLAIN_STAGE = "megatron-core"


def blocks(lines: list[Line]) -> str:
    """What hyper-connections add to a stage of Transformer Engine blocks, launched by the host."""
    rows: dict[tuple[str, str, str], dict[str, Line]] = {}
    for line in with_fused_attention(lines):
        shape = line["shape"]
        if line.get("launch") == "graph" or "experts" in shape:
            continue
        key = (shape["model"], shape["dtype"], line["impl"])
        rows.setdefault(key, {})[line["metric"]] = line
    body = []
    for (model, dtype, implementation), row in rows.items():
        if implementation == _PLAIN_STAGE:
            continue
        step, kernels, memory = (row.get(name) for name in ("step", "kernels", "memory"))
        assert step is not None and memory is not None
        body.append(
            [
                *(model, dtype, implementation.removeprefix("mhc_megatron.")),
                f"{step['plain']:.1f} + {step['overhead']:.1f} %",
                "" if kernels is None else f"{kernels['plain']:.1f} + {kernels['overhead']:.1f} %",
                "" if kernels is None else f"{kernels['hyper_connections']:.2f}",
                f"{(memory['value'] - memory['plain']) / 2**20:.0f}",
            ]
        )
    head = ["model", "branches", "recompute", "step, ms", "kernels, ms", "of ours, ms", "MiB more"]
    return markdown(head, body)


def block_graphs(lines: list[Line]) -> str:
    """The same stages as one CUDA graph, where no host is waited for."""
    rows: dict[tuple[str, str], dict[str, Line]] = {}
    for line in with_fused_attention(lines):
        shape = line["shape"]
        if line.get("launch") == "graph":
            rows.setdefault((shape["model"], shape["dtype"]), {})[line["impl"]] = line
    body = []
    for (model, dtype), row in rows.items():
        cells = [f"{row[_PLAIN_STAGE]['value']:.1f} ms"]
        for name in ("none", "auto"):
            step = row[f"mhc_megatron.{name}"]
            cells.append(f"{step['value']:.1f} ms, {step['overhead']:+.1f} %")
        body.append([model, dtype, *cells])
    return markdown(["model", "branches", "plain", "mHC", "mHC, recompute auto"], body)


def overlap(lines: list[Line], launch: str = "eager") -> str:
    """A forward and a backward of a stage in every overlap mode, of the last run of a launch."""
    found = [line for line in lines if line.get("launch") == launch]
    rows: dict[str, dict[str, Line]] = {}
    for line in found:
        if line["run"] == found[-1]["run"]:
            rows.setdefault(line["impl"], {})[line["metric"]] = line
    body = []
    alone = any("predicted_alone" in row["pair"] for row in rows.values())
    for implementation, row in rows.items():
        pair = row["pair"]
        predicted = pair.get("predicted")
        body.append(
            [
                implementation.removeprefix("mhc_megatron."),
                f"{pair['value']:.0f}",
                *([f"{pair['predicted_alone']:.0f}" if predicted else ""] if alone else []),
                "" if predicted is None else f"{predicted:.0f}",
                "" if predicted is None else f"{pair['value'] / predicted:.2f}",
                *(
                    f"{row[name]['value']:.0f} % of {row[name]['total']:.1f} ms"
                    for name in ("hidden_mhc", "hidden_exchanges")
                ),
            ]
        )
    head = ["overlap", "pair, ms", *(["alone, ms"] if alone else []), "predicted, ms", "ratio"]
    return markdown([*head, "hidden of mHC", "hidden of exchanges"], body)


def slowdowns(lines: list[Line], launch: str = "eager") -> str:
    """How many times as long a lane takes beside each other one, by the last run of a launch."""
    found = [line for line in lines if line.get("launch") == launch and "slowdowns" in line]
    factors = found[-1]["slowdowns"]
    body = [
        [
            lane,
            *(f"{factors[lane][other]:.2f}" if other in factors[lane] else "" for other in factors),
        ]
        for lane in factors
    ]
    return markdown(["lane", *(f"beside {other}" for other in factors)], body)


def multigpu(lines: list[Line]) -> str:
    """Steps of pipelines over several GPUs: the plain residual, and what mHC adds, by variant.

    In brackets the same of a stage, without bubbles and optimizer, where it was measured.
    """
    return _added("schedule", steps(lines), steps(lines, "stage"))


def multigpu_experts(lines: list[Line]) -> str:
    """Steps of expert parallelism over several GPUs, likewise."""
    return _added("layout", experts(lines), experts(lines, "stage"))


def _added(
    what: str, found: dict[str, dict[str, float]], stages: dict[str, dict[str, float]]
) -> str:
    plain, plain_stages = found.pop(PLAIN), stages.get(PLAIN, {})
    body = []
    for layout, base in plain.items():
        stage = plain_stages.get(layout)
        row = [layout, f"{base:.0f} ms" + ("" if stage is None else f" ({stage:.1f} ms)")]
        for name, times in found.items():
            cell = ""
            if layout in times:
                cell = _more(times[layout], base)
                own = stages.get(name, {}).get(layout)
                if stage is not None and own is not None:
                    cell += f" ({_more(own, stage)})"
            row.append(cell)
        body.append(row)
    names = [name.removeprefix("mhc_megatron.") for name in found]
    return markdown([what, "plain", *names], body)


def _more(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %"


def multigpu_scaling(lines: list[Line]) -> str:
    """Tokens per second over data-parallel GPUs, in brackets over that of one GPU times theirs."""
    found = scaling(lines)
    sizes = sorted({size for rates in found.values() for size in rates})
    body = [
        [
            name,
            *(
                f"{rates[size]:.0f} ({rates[size] / (size * rates[sizes[0]]):.2f})"
                if size in rates
                else ""
                for size in sizes
            ),
        ]
        for name, rates in found.items()
    ]
    return markdown(["tokens/s", *(f"DP={size}" for size in sizes)], body)


def parity(lines: list[Line]) -> str:
    """Layouts on several GPUs against one: what was compared, and how far the furthest is."""
    latest = {line["impl"]: line for line in lines if line["metric"] == "parity"}
    body = []
    for implementation, line in sorted(latest.items(), key=lambda item: item[1]["bound"]):
        rounding = line["rounding"] or {}
        cells = [implementation.removeprefix("mhc_megatron."), line["bound"]]
        cells += [f"{line['value']}", f"{line['mismatches']}"]
        for kind in ("gradients", "parameters", "losses"):
            largest, noise = line["largest"][kind], rounding.get(kind)
            cells.append("" if largest is None else f"{largest:.1e}" if largest else "0")
            cells[-1] += f" ({noise:.1e})" if noise and largest is not None else ""
        body.append(cells)
    head = ["layout", "bound", "tensors", "beyond it", "gradients", "parameters", "losses"]
    return markdown(head, body)


def p2p(lines: list[Line]) -> str:
    """Bandwidth of the streams' messages between two GPUs."""
    found = bandwidths(lines)
    widths = sorted({width for rates in found.values() for width in rates})
    body = [
        [name, ways, *(f"{rates[width]:.0f}" for width in widths)]
        for (name, ways), rates in found.items()
    ]
    return markdown(["GB/s in a direction", "", *(f"C = {width}" for width in widths)], body)


def step_graph(lines: list[Line], channels: int) -> str:
    """Training steps of one width on one GPU, launched kernel by kernel and as one CUDA graph."""
    rows: dict[str, dict[str, dict[str, Line]]] = {}
    for line in with_fused_attention(lines):
        if line["shape"]["C"] != channels:
            continue
        by_launch = rows.setdefault(line["impl"], {}).setdefault(line["launch"], {})
        by_launch[line["metric"]] = line
    body = []
    for implementation, row in rows.items():
        name = implementation.removeprefix("mhc_megatron.")
        cells = ["plain" if implementation == PLAIN else name]
        for launch in ("eager", "graph"):
            if launch not in row:
                cells += ["", ""]
                continue
            step, memory = row[launch]["step"], row[launch]["peak_memory"]
            over = step.get("ratio_to_baseline")
            more = "" if over is None else f", {100 * (over - 1):+.1f} %"
            cells += [f"{step['value']:.0f} ms{more}", f"{memory['value'] / 2**30:.1f}"]
        body.append(cells)
    return markdown(["residual", "eager", "GiB", "as one graph", "GiB"], body)


def step_graphs(lines: list[Line]) -> str:
    """``step_graph`` of every width."""
    widths = dict.fromkeys(line["shape"]["C"] for line in lines)
    return "\n\n".join(f"C = {width}\n\n{step_graph(lines, width)}" for width in widths)


def training(lines: list[Line]) -> str:
    """Final losses of a model in bf16 and each FP8 recipe, a column per commit and seed."""
    lines = [line for line in lines if "seed" in line["shape"]]
    names = {_commit_and_seed(line): None for line in lines}
    rows: dict[tuple[str, str], dict[str, Line]] = {}
    repeats: dict[tuple[str, str], set[bool]] = {}
    for line in lines:
        key = (line["impl"], line["shape"]["dtype"])
        rows.setdefault(key, {}).setdefault(_commit_and_seed(line), line)
        if "deterministic" in line:
            repeats.setdefault(key, set()).add(line["deterministic"])
    body = []
    for (implementation, dtype), by_name in sorted(rows.items(), key=_bf16_first):
        cells = []
        for name in names:
            line = by_name.get(name, {})
            ratio = line.get("ratio_to_bf16")
            more = "" if dtype == "bf16" or ratio is None else f", {100 * (ratio - 1):+.1f} %"
            cells.append(f"{line['value']:.3f}{more}" if line else "")
        same = repeats.get((implementation, dtype))
        bits = "" if same is None else "the same bits" if same == {True} else "other bits"
        body.append(["plain" if implementation == PLAIN else "mHC", dtype, *cells, bits])
    return markdown(["residual", "branches", *names, "repeated"], body)


def _commit_and_seed(line: Line) -> str:
    return f"{line['commit'][:7]}, seed {line['shape']['seed']}"


def _bf16_first(item: tuple[tuple[str, str], object]) -> tuple[bool, bool, str]:
    (implementation, dtype), _ = item
    return implementation == PLAIN, dtype != "bf16", dtype


def messages(lines: list[Line]) -> str:
    """Validation losses of pipelines by the format of their messages, a column per seed."""
    latest = {line["shape"]["messages"]: line for line in lines}
    body = [
        [name, *(f"{losses['valid']:.3f}" for losses in line["by_seed"])]
        for name, line in latest.items()
    ]
    seeds = [f"seed {number}" for number in range(1, len(body[0]))]
    return markdown(["messages", *seeds], body)


def of_te_blocks(lines: list[Line]) -> list[str]:
    graphs = any(line.get("launch") == "graph" for line in lines)
    return [blocks(lines), *([block_graphs(lines)] if graphs else [])]


def of_multigpu(lines: list[Line]) -> list[str]:
    found = [multigpu(lines)]
    if experts(lines):
        found.append(multigpu_experts(lines))
    if scaling(lines):
        found.append(multigpu_scaling(lines))
    return [*found, p2p(lines), parity(lines)]


def of_overlap(lines: list[Line]) -> list[str]:
    slowed = {line.get("launch") for line in lines if "slowdowns" in line}
    launches = ("eager", "graph")
    return [
        *(overlap(lines, launch) for launch in launches),
        *(slowdowns(lines, launch) for launch in launches if launch in slowed),
    ]


# Of a results file, by its name.
TABLES: dict[str, Callable[[list[Line]], list[str]]] = {
    "te_blocks": of_te_blocks,
    "overlap": of_overlap,
    "multigpu": of_multigpu,
    "step_graph": lambda lines: [step_graphs(lines)],
    "fp8_training": lambda lines: [training(lines)],
    "message_training": lambda lines: [messages(lines)],
}


def tables(path: str) -> list[str]:
    """Of a command's argument, a results file."""
    name = Path(path).stem
    if name not in TABLES:
        expected = ", ".join(f"{known}.jsonl" for known in TABLES)
        raise argparse.ArgumentTypeError(f"expected one of {expected}, got {path}")
    return TABLES[name](results(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=tables, metavar="lines", help="a results file of its name")
    print(*parser.parse_args().tables, sep="\n")
