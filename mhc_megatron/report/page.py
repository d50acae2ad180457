"""The HTML around charts and tables: one file, no scripts, nothing loaded from elsewhere.

Functions take plain text and escape it; what they return is HTML.
"""

from collections.abc import Sequence
from html import escape

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f6f4; color: #222;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .6rem; max-width: 46rem; }
section { background: #fff; border: 1px solid #e4e4e0; border-radius: 6px;
  padding: 1rem 1.2rem; margin: 1rem 0; }
.lead { color: #555; }
.status { display: inline-block; padding: 0 .55em; border-radius: 1em; font-size: .85em;
  border: 1px solid currentColor; }
.finished { color: #00684c; } .running, .stopped { color: #005a8e; } .failed { color: #a84300; }
.note { border-left: 3px solid #D55E00; padding-left: .7em; color: #555; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; }
figure { margin: 0; min-width: 0; }
figcaption { color: #666; font-size: .85em; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif
  !important; }
.wide { overflow-x: auto; }
.wide svg { min-width: 42rem; }
table { border-collapse: collapse; font-size: .93em; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ededea; }
td { overflow-wrap: anywhere; }
thead th { font-weight: 600; border-bottom-color: #bbb; vertical-align: bottom; }
tbody th { font-weight: 400; color: #555; white-space: nowrap; }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers tbody th { color: #222; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  margin-right: .5em; }
summary { cursor: pointer; }
"""


def page(title: str, *, heading: str, body: Sequence[str]) -> str:
    """A whole document; ``heading`` and ``body`` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{heading}\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def section(name: str, heading: str, *content: str) -> str:
    """A part of the page, with ``name`` as its anchor; ``content`` is HTML."""
    inner = "\n".join(content)
    return f'<section id="{escape(name)}">\n<h2>{escape(heading)}</h2>\n{inner}\n</section>'


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def charts(*figures: str) -> str:
    """Figures side by side where there is room."""
    return '<div class="charts">\n' + "\n".join(figures) + "\n</div>"


def figure(svg: str, *, caption: str = "") -> str:
    """A chart with an optional caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{svg}{below}</figure>"


def wide(svg: str, *, caption: str = "") -> str:
    """A figure over the whole width; on a narrow screen it scrolls rather than shrinks."""
    return f'<div class="wide">\n{figure(svg, caption=caption)}\n</div>'


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values."""
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>\n<tbody>\n{lines}\n</tbody>\n</table>"


def numbers(header: Sequence[str], rows: Sequence[Sequence[str]], *, colours: Sequence[str]) -> str:
    """A table of numbers with a coloured key before each row's name, the first cell."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    lines = []
    for row, colour in zip(rows, colours, strict=True):
        key = f'<span class="key" style="background:{escape(colour)}"></span>'
        cells = "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        lines.append(f'<tr><th scope="row">{key}{escape(row[0])}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="numbers">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def details(summary: str, content: str) -> str:
    """Something that opens on a click; ``content`` is HTML."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"
