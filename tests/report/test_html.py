"""The reports: complete, well-formed, self-contained, and the same bytes for the same run."""

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_megatron.errors import UserError
from mhc_megatron.report.compare import write_comparison
from mhc_megatron.report.html import layout_text, write_report
from mhc_megatron.report.metrics import read_run, write_run
from mhc_megatron.training.config import ParallelConfig

MakeRun = Callable[..., Path]

SECTIONS = [
    "summary",
    "loss",
    "grad-norm",
    "speed",
    "gains-depth",
    "gains-training",
    "log-column",
    "configuration",
]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Document(html.parser.HTMLParser):
    """Checks that elements nest, and collects identifiers, sections, tags and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.sections: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not {"src", "srcset", "onclick"} & values.keys()
        for key in ("href", "xlink:href"):
            assert (values.get(key) or "#").startswith("#")
        if "id" in values:
            self.identifiers.append(values["id"] or "")
        if tag == "section":
            self.sections.append(values["id"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(path: Path) -> Document:
    document = Document(path)
    assert len(set(document.identifiers)) == len(document.identifiers)
    assert not {"script", "link", "iframe", "img"} & set(document.tags)
    source = path.read_text(encoding="utf-8")
    assert "http" not in re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", source)
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    return document


def test_a_report_has_every_section_and_stands_alone(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run")
    path = write_report(folder)
    assert path == folder / "report.html"
    document = check(path)
    assert document.sections == SECTIONS
    assert document.tags.count("svg") == 10
    for text in (
        "finished",
        "842,752",
        "TP=2 + SP, 2 processes",
        "2.13.0+cpu",
        "204.0 ms (median)",
        "projection sinkhorn",
        "bound 2",
        "sublayer 3 is 1.mlp",
        "optimizer.lr",
    ):
        assert text in document.text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, make_run: MakeRun) -> None:
    one, two = (make_run(tmp_path / parent / "run", steps=80) for parent in ("a", "b"))
    assert write_report(one).read_bytes() == write_report(two).read_bytes()
    assert write_report(one).read_bytes() == (one / "report.html").read_bytes()
    first, second = (
        write_comparison({"x": one, "y": two}, tmp_path / f"{name}.html") for name in "ab"
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_plain_run_says_why_it_has_no_gains(tmp_path: Path, make_run: MakeRun) -> None:
    document = check(write_report(make_run(tmp_path / "run", "plain")))
    assert document.sections == SECTIONS
    assert document.tags.count("svg") == 4
    assert document.text.count("plain residual connection: it has no residual mappings") == 3


def test_a_run_before_its_first_probe_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    document = check(write_report(make_run(tmp_path / "run", probe_every=100, status="running")))
    assert document.text.count("No probe of the residual mappings has been recorded") == 3
    assert "running" in document.text


def test_text_is_escaped(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "<run> & co")
    info = read_run(folder)
    attack = '"><script>alert(1)</script>'
    write_run(
        folder,
        dataclasses.replace(
            info,
            config={**info.config, attack: attack},
            environment={attack: attack},
            error=f"first {attack}",
        ),
    )
    document = check(write_report(folder))
    assert "<run> & co" in document.text and f"first {attack}" in document.text
    names = {attack: folder, "<b>&": folder}
    document = check(write_comparison(names, tmp_path / "comparison.html"))
    assert attack in document.text and "<b>&" in document.text


def test_a_torn_line_and_a_missing_run_json_are_mentioned(
    tmp_path: Path, make_run: MakeRun
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "run.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    document = check(write_report(folder))
    assert "The last line of metrics.jsonl was cut off" in document.text
    assert "There is no run.json" in document.text
    assert document.sections == SECTIONS[:-1]


def test_a_failed_run_shows_its_error(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run", status="failed")
    write_run(folder, dataclasses.replace(read_run(folder), error="loss is nan at step 12"))
    assert "loss is nan at step 12" in check(write_report(folder)).text


def test_a_probe_with_a_missing_sublayer_is_named(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run")
    lines = (folder / "gains.jsonl").read_text().splitlines()
    probe = json.loads(lines[1])
    probe["composite"]["backward"].pop()
    lines[1] = json.dumps(probe)
    (folder / "gains.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"gains\.jsonl', line 2: composite\.backward"):
        write_report(folder)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        (ParallelConfig(), "1 process"),
        (ParallelConfig(tensor=2, sequence=True), "TP=2 + SP, 2 processes"),
        (
            ParallelConfig(pipeline=4, virtual=2, data=2, distributed_optimizer=True),
            "PP=4, VPP=2, DP=2, distributed optimizer, 8 processes",
        ),
        (ParallelConfig(context=2, expert=2), "CP=2, EP=2, 2 processes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts_read_as_megatron_writes_them(parallel: ParallelConfig, text: str) -> None:
    assert layout_text({"parallel": dataclasses.asdict(parallel)}) == text


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, mhc_megatron.report.html, mhc_megatron.report.compare\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
