"""``mhc-megatron simulate`` from arguments to files."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mhc_megatron.launch import cli

FILES = ["index.html", "schedule.csv", "timeline.svg", "trace.json"]


def _run(*arguments: str) -> int:
    return cli.main(["simulate", *arguments])


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    numbers = ("--ranks", "8", "--micro-batches", "32")
    assert _run("--schedule", "dualpipe_v", *numbers, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "bubble                      6.80% of all ranks' time" in printed
    assert "0 to 7  0,15 to 7,8   192      14     6.80%         17" in printed
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "timeline.svg").read_text().startswith("<svg")
    assert json.loads((out / "trace.json").read_text())
    # What was written can be read, and says the same.
    assert _run("--csv", str(out / "schedule.csv")) == 0
    assert "makespan                    206" in capsys.readouterr().out


def test_costs_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    file.write_text('{"unit": "ms", "default": {"recompute": 1}, "bandwidth": 1e9}')
    step = ("--schedule", "one_f_one_b", "--ranks", "2", "--micro-batches", "2")
    sizes = ("--hidden", "1024", "--seq", "1024", "--layers", "4", "--streams", "2")
    more = ("--micro-batch-size", "2", "--recompute-block", "2")
    assert _run(*step, "--costs", str(file), *sizes, *more) == 0
    text = capsys.readouterr().out
    # 4 MiB per C: 4 sublayers of 7 and 2 blocks of 2 streams, twice; a rebuild of 2 sublayers.
    # Twice for 4 sublayers: 18 float32 numbers of 2048 tokens, and two parts of phi, 8 rows of 2 C.
    rest = 2 * 4 * (4 * 18 * 2048 + 2 * 2 * 8 * 2 * 1024) / 2**20
    assert f"peak activations of a rank  {4 * (2 * (4 * 7 + 4) + 2 * 4) + rest:.2f} MiB" in text
    assert "makespan                    12.02 ms" in text
    assert _run(*step, "--costs", str(file), "--place-recompute") == 0
    assert "makespan                    11 ms" in capsys.readouterr().out


def test_messages_in_fp8_take_their_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "costs.json"
    # A message of n*C = 256 numbers a token: 512 bytes, or 256 and two scales.
    file.write_text('{"bandwidth": 1, "default": {"forward": 10000, "dgrad": 1, "wgrad": 0}}')
    step = ("--schedule", "one_f_one_b", "--ranks", "2", "--micro-batches", "1")
    sizes = ("--costs", str(file), "--hidden", "64", "--seq", "1", "--messages")
    for messages, bytes_sent in (("model", 512), ("fp8", 258)):
        assert _run(*step, *sizes, messages) == 0
        assert f"makespan                    {20002 + 2 * bytes_sent:,}" in capsys.readouterr().out


STEP = ("--ranks", "4", "--micro-batches", "8")
GPIPE = ("--schedule", "gpipe", *STEP)
PAIRED = ("--schedule", "dualpipe_v", "--ranks", "4", "--micro-batches", "10")
PHASE_COSTS = (*PAIRED, "--overlap", "post", "--phase-costs")
OVERLAP_TABLE = """\
a forward beside a backward takes 16; one after the other 24 (0.667)
lane           busy   share  exposed
compute          16  100.0%       16
communication     8   50.0%        0
priority          0    0.0%        0
lanes do not slow each other down here: no slowdowns were given; on a GPU they share \
multiprocessors and memory
"""
SLOWED_TABLE = """\
a forward beside a backward takes 20; one after the other 24 (0.833)
lane           busy   share  exposed
compute          20  100.0%       20
communication     8   40.0%        0
priority          0    0.0%        0
slowdowns: compute beside communication 2, priority beside compute 2; without them it would \
take 16 (1.250 times as long with them)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "nothing to simulate; give --csv FILE, or --schedule with one of gpipe, one_f_one_b, "
            "interleaved, zb_h1, dualpipe_v, dualpipe",
        ),
        (("--schedule", "gpipe", "--ranks", "2"), "--schedule gpipe needs --micro-batches"),
        (
            ("--schedule", "dualpipev", *STEP),
            "unknown schedule 'dualpipev'; did you mean 'dualpipe_v'? known: gpipe, one_f_one_b, "
            "interleaved, zb_h1, dualpipe_v, dualpipe",
        ),
        (
            ("--schedule", "dualpipe_v", "--ranks", "4", "--micro-batches", "7"),
            "num_mb=7 is below 2*num_ranks=8, which dualpipe_v needs; take more micro-batches, "
            "or one_f_one_b",
        ),
        (
            ("--schedule", "gpipe", *STEP, "--chunks", "2"),
            "num_chunks=2 is for interleaved; gpipe has no choice",
        ),
        (
            ("--csv", "x.csv", "--ranks", "4"),
            "--ranks 4 is for a generated schedule; leave it or --csv out",
        ),
        (
            ("--csv", "absent.csv"),
            "absent.csv: No such file or directory; name a readable text file",
        ),
        (
            ("--csv", "broken.csv"),
            "broken.csv: line 1 (rank 0): 0B0 is missing, and so are I and W; add B, or I and W",
        ),
        (
            ("--csv", "twice.csv"),
            "twice.csv: line 2, cells 2 and 5 (rank 1): 1F0 appears twice; keep one",
        ),
        (
            ("--csv", "early.csv"),
            "early.csv: line 2, cell 3 (rank 1): 1B1 comes before 1F1, which it needs; move it "
            "behind",
        ),
        (
            ("--csv", "phases.json"),
            'phases.json: line 1, cell 1: \'{"gelu": {"forward": 1}}\' is not an action; write '
            "2F0, 2B0, 2I0, 2W0, 2R0 (stage, operation, micro-batch) or (0F7;7B3)OVERLAP_F_B",
        ),
        (
            (*GPIPE, "--costs", "costs.json"),
            "costs.json: costs for stage 9, but the schedule has 4 stages; name 0 to 3, or -1 for "
            "the last",
        ),
        (
            (*GPIPE, "--costs", "phases.json"),
            "phases.json: the file: unknown field 'gelu'; known: default, stages, latency, "
            "message_bytes, bandwidth, unit",
        ),
        (
            ("--schedule", "one_f_one_b", "--ranks", "100000", "--micro-batches", "100000"),
            "--ranks 100000 --micro-batches 100000: 20,000,000,000 actions are above the "
            "12,000,000 that are simulated in about a minute and 3 GiB; take fewer ranks or "
            "micro-batches",
        ),
        (
            ("--schedule", "dualpipe_v", "--ranks", "1500", "--micro-batches", "3000"),
            "--ranks 1500 --micro-batches 3000: 17,998,501 actions are above the 12,000,000 that "
            "are simulated in about a minute and 3 GiB; take fewer ranks or micro-batches",
        ),
        (
            ("--schedule", "gpipe", "--ranks", "10001", "--micro-batches", "1"),
            "--ranks 10001 --micro-batches 1: 10,001 ranks are above the 10,000 that are "
            "simulated in about a minute and 3 GiB; take fewer ranks",
        ),
        (
            ("--schedule", "gpipe", "--ranks", "1", "--micro-batches", "500001"),
            "--ranks 1 --micro-batches 500001: 1,000,002 actions on each rank are above the "
            "1,000,000 that are simulated in about a minute and 3 GiB; take fewer micro-batches",
        ),
        (
            ("--schedule", "gpipe", "--ranks", "-100000", "--micro-batches", "-100000"),
            "num_ranks=-100000 must be at least 1",
        ),
        (
            ("--csv", "long.csv"),
            "long.csv: 10,001 ranks are above the 10,000 that are simulated in about a minute and "
            "3 GiB; take fewer ranks",
        ),
        (
            ("--schedule", "gpipe", *STEP, "--costs", "broken.csv"),
            "broken.csv: not JSON: Extra data: line 1 column 2 (char 1)",
        ),
        (
            ("--schedule", "gpipe", *STEP, "--hidden", "4"),
            "bytes need both --hidden and --seq; give them, or none of the sizes",
        ),
        (
            ("--schedule", "gpipe", *STEP, "--streams", "4"),
            "bytes need both --hidden and --seq; give them, or none of the sizes",
        ),
        (
            ("--schedule", "gpipe", *STEP, "--hidden", "0", "--seq", "1"),
            "hidden=0 must be at least 1",
        ),
        (
            (*GPIPE, "--hidden", "4", "--seq", "1", "--layers", "6"),
            "--layers 6 is not a multiple of the 4 stages; change it, or give the bytes of each "
            "stage in --costs",
        ),
        (
            (*GPIPE, "--overlap", "post"),
            "--overlap post: gpipe pairs no forward with a backward; use dualpipe_v or dualpipe",
        ),
        (
            (*GPIPE, "--experts"),
            "--phase-costs, --experts and --tensor-parallel describe --overlap; give it, or leave "
            "them out",
        ),
        (
            (*GPIPE, "--tensor-parallel", "sequence"),
            "--phase-costs, --experts and --tensor-parallel describe --overlap; give it, or leave "
            "them out",
        ),
        (
            (*PAIRED, "--overlap", "all", "--recompute-block", "0"),
            "--overlap all with --recompute-block 0 has nothing to rebuild; use --overlap post",
        ),
        (
            (*PHASE_COSTS, "phases.json"),
            "phases.json: the file: unknown field 'gelu'; known: enter, attention, attention_post, "
            "mlp, router, dispatch, experts, combine, unpermute, mlp_post, leave, "
            "attention_gather, attention_scatter, attention_copy, attention_reduce, mlp_gather, "
            "mlp_scatter, mlp_copy, mlp_reduce, slowdowns",
        ),
        (
            (*PHASE_COSTS, "none.json"),
            "none.json: no cost for the phase 'enter'; add one to the costs, which have none",
        ),
        (
            (*PHASE_COSTS, "faster.json"),
            "faster.json: slowdowns.compute.priority=0.5 must be at least 1, the time beside the "
            "other lane over the time alone; write 1 where it is not slowed down",
        ),
        (
            (*PHASE_COSTS, "text.json"),
            'text.json: slowdowns.priority.compute="2x" is not a number; write one such as 2.5, or '
            "leave it out",
        ),
        (
            (*PHASE_COSTS, "itself.json"),
            "itself.json: slowdowns.compute: unknown field 'compute'; known: communication, "
            "priority",
        ),
        (
            (*PHASE_COSTS, "lane.json"),
            "lane.json: slowdowns: unknown field 'memory'; known: compute, communication, priority",
        ),
        (
            (*PHASE_COSTS, "dense.json", "--tensor-parallel", "sequence"),
            "dense.json: no cost for the phase 'attention_gather'; add one to attention, "
            "attention_post, enter, mlp, mlp_post",
        ),
        (
            (*PHASE_COSTS, "attention.json"),
            "attention.json: attention.forward is given twice; keep one of them",
        ),
        (
            (*PHASE_COSTS, "few.json"),
            "few.json: no cost for the phase 'enter'; add one to attention, attention_post",
        ),
        (
            ("--schedule", "gpipe", *STEP, "--out", "broken.csv"),
            "--out broken.csv: File exists; name a writable folder",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.csv").write_text("0F0\n")
    (tmp_path / "twice.csv").write_text("0F0,0B0\n,1F0,,1B0,1F0\n")
    (tmp_path / "early.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1B1,1F1\n")
    (tmp_path / "long.csv").write_text("0F0,0B0\n" * 10_001)
    (tmp_path / "costs.json").write_text('{"stages": {"9": {"forward": 2}}}')
    (tmp_path / "phases.json").write_text('{"gelu": {"forward": 1}}')
    for name, slowdowns in {
        "none": "{}",
        "faster": '{"compute": {"priority": 0.5}}',
        "text": '{"priority": {"compute": "2x"}}',
        "itself": '{"compute": {"compute": 2}}',
        "lane": '{"memory": {"compute": 2}}',
    }.items():
        (tmp_path / f"{name}.json").write_text(f'{{"slowdowns": {slowdowns}}}')
    (tmp_path / "attention.json").write_text('{"attention": {"forward": 1, "forward": 2}}')
    dense = ("enter", "attention", "attention_post", "mlp", "mlp_post")
    (tmp_path / "dense.json").write_text(json.dumps({name: {"forward": 1} for name in dense}))
    (tmp_path / "few.json").write_text('{"attention": {}, "attention_post": {}}')
    assert _run(*arguments) == 2
    assert capsys.readouterr().err == f"mhc-megatron: error: {message}\n"


def test_a_deadlock_prints_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred ranks, of which the last takes the second micro-batch first."""
    last = 99
    rows = [f"{rank}F0,{rank}B0,{rank}F1,{rank}B1" for rank in range(last)]
    rows.append(f"{last}F1,{last}F0,{last}B0,{last}B1")
    (tmp_path / "stuck.csv").write_text("\n".join(rows))
    assert _run("--csv", str(tmp_path / "stuck.csv")) == 2
    caught = capsys.readouterr()
    waits = [f"rank {rank} at {rank}B0 waits for {rank + 1}B0" for rank in range(last)]
    waits.append("rank 99 at 99F1 waits for 98F1")
    name = f"{tmp_path / 'stuck.csv'}: deadlock: "
    assert caught.out == "\n".join([f"{name}100 ranks wait", *waits, ""])
    assert caught.err == (
        f"mhc-megatron: error: {name}{'; '.join(waits[:8])}; and 92 more ranks; move what is "
        "waited for forward on its rank\n"
    )


NO_BYTES = (
    "- : no bytes are known; --hidden and --seq give them, or held_bytes and rebuilt_bytes of the "
    "stages in --costs"
)


def test_without_bytes_it_says_what_gives_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*GPIPE, "--out", str(tmp_path / "out")) == 0
    assert capsys.readouterr().out.count(f"\n\n{NO_BYTES}\n") == 1
    assert NO_BYTES in (tmp_path / "out" / "index.html").read_text()
    file = tmp_path / "costs.json"
    file.write_text('{"stages": {"0": {"held_bytes": 1}}}')
    for known in (("--hidden", "8", "--seq", "8"), ("--costs", str(file))):
        assert _run(*GPIPE, *known, "--out", str(tmp_path / "out")) == 0
        assert NO_BYTES not in capsys.readouterr().out
        assert NO_BYTES not in (tmp_path / "out" / "index.html").read_text()


def test_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Closed form: each micro-batch has products of 4 + 4 and exchanges of 2 + 2 per direction."""
    costs = {"attention": {"forward": 4, "dgrad": 4}, "experts": {"forward": 4, "dgrad": 4}}
    costs |= {name: {"forward": 2, "dgrad": 2} for name in ("dispatch", "combine")}
    others = ("enter", "attention_post", "router", "unpermute", "mlp_post")
    (tmp_path / "phases.json").write_text(json.dumps(costs | {name: {} for name in others}))
    pair = ("--overlap", "post", "--experts", "--phase-costs", str(tmp_path / "phases.json"))
    out = tmp_path / "out"
    assert _run(*PAIRED, *pair, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert f"\n\n{OVERLAP_TABLE}\nwritten: " in printed
    assert "makespan                    476" in printed
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "overlap.svg"])
    drawing = ElementTree.fromstring((out / "overlap.svg").read_text())
    assert len(drawing.findall(".//{*}title")) == 8  # four phases that take time, both ways


@pytest.mark.parametrize(
    ("kind", "around"),
    [
        ("sequence", {"gather": (2, 2), "scatter": (2, 2)}),
        ("all_reduce", {"copy": (0, 4), "reduce": (4, 0)}),
    ],
)
def test_collectives_of_tensor_parallelism(
    kind: str,
    around: dict[str, tuple[int, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Closed form: products of 4 and 4 in either direction, collectives of 8 in each."""
    costs = {name: {"forward": 4, "dgrad": 4} for name in ("attention", "mlp")}
    for branch in ("attention", "mlp"):
        for name, (forward, dgrad) in around.items():
            costs[f"{branch}_{name}"] = {"forward": forward, "dgrad": dgrad}
    costs |= {name: {} for name in ("enter", "attention_post", "mlp_post")}
    (tmp_path / "phases.json").write_text(json.dumps(costs))
    pair = ("--overlap", "post", "--tensor-parallel", kind)
    pair += ("--phase-costs", str(tmp_path / "phases.json"), "--out", str(tmp_path / "out"))
    assert _run(*PAIRED, *pair) == 0
    printed = capsys.readouterr().out
    assert "one after the other 32 (" in printed
    lines = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line.strip()}
    assert (lines["compute"], lines["communication"]) == ("16", "16")
    drawing = ElementTree.fromstring((tmp_path / "out" / "overlap.svg").read_text())
    titles = "".join(title.text or "" for title in drawing.findall(".//{*}title"))
    assert all(f" 0.{name}: " in titles for name in costs if costs[name])


def test_lanes_that_slow_each_other_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Closed form: exchanges of 8, beside each of which half of the products are done."""
    costs: dict[str, object] = {
        "attention": {"forward": 4, "dgrad": 4},
        "experts": {"forward": 4, "dgrad": 4},
    }
    costs |= {name: {"forward": 2, "dgrad": 2} for name in ("dispatch", "combine")}
    costs |= {name: {} for name in ("enter", "attention_post", "router", "unpermute", "mlp_post")}
    costs["slowdowns"] = {"compute": {"communication": 2}, "priority": {"compute": 2}}
    (tmp_path / "phases.json").write_text(json.dumps(costs))
    pair = ("--overlap", "post", "--experts", "--phase-costs", str(tmp_path / "phases.json"))
    assert _run(*PAIRED, *pair) == 0
    assert SLOWED_TABLE in capsys.readouterr().out


def test_large_steps_leave_the_long_files_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mhc_megatron.launch.simulate._MAX_WRITTEN", 63)
    assert _run(*GPIPE, "--out", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "timeline.svg"]
    assert "left out: trace.json and schedule.csv; 64 actions" in capsys.readouterr().out


def test_help_shows_schedules_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("dualpipe_v", "zb_h1", '"unit": "ms"', "--place-recompute", "examples:"):
        assert word in text
