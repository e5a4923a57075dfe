"""Sections of a report as one HTML page that needs nothing else: no network, no scripts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from smtc.benchmarks.blocks import UNMEASURED, Block, Chart, Table
from smtc.benchmarks.charts import svg

FOLDED = 25
"""A table with more rows is shown after a click."""

NUMERIC = re.compile(r"[-+≥]? ?\d([^a-zA-Z]|e[-+])*( ?(x|ms|%))?")
"""A cell that is set to the right where its whole column is so."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --faint: #636c76; --rule: #d8dee4;
  --band: #f4f6f8; --link: #0958c2; --own: #2f6fd6; --eager: #2a9d76; --other: #9aa4af; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --ink: #e3e8ee; --faint: #98a3ae;
  --rule: #323a43; --band: #1a2027; --link: #79b4ff; --own: #5b97f5; --eager: #45b98f;
  --other: #6d7783; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 1rem 0 0.5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--rule); }
p { margin: 0.5rem 0; max-width: 50rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; }
code { font: 0.9em ui-monospace, monospace; background: var(--band); padding: 0.1em 0.3em;
  border-radius: 3px; }
.where, .no, figcaption, summary { color: var(--faint); }
.where { font-size: 0.87rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--rule); text-align: left;
  white-space: nowrap; }
th { font-weight: 600; background: var(--band); }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
.number { text-align: right; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
  gap: 1.25rem 2rem; margin: 1rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.87rem; font-weight: 600; }
svg text { fill: var(--ink); font-size: 12px; }
svg .value { fill: var(--faint); }
svg line { stroke: var(--ink); stroke-width: 1.5; }
.own { fill: var(--own); background: var(--own); }
.eager { fill: var(--eager); background: var(--eager); }
.other { fill: var(--other); background: var(--other); }
.key { white-space: nowrap; }
.key i { display: inline-block; width: 0.8em; height: 0.8em; margin: 0 0.3em 0 0.5em; }
"""

KEY = (
    '<p class="where">Bars: <span class="key"><i class="own"></i>ours</span> '
    '<span class="key"><i class="eager"></i>the best plain PyTorch</span> '
    '<span class="key"><i class="other"></i>everything else</span><br>The line on a bar is the '
    "range of the middle 60 % of its times, or of the seeds. Each chart has its own scale, which "
    "begins at zero.</p>"
)


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    name: str
    title: str
    where: str
    """Machine, versions and commit."""
    blocks: Sequence[Block]


def html(title: str, parts: Sequence[Part]) -> str:
    """The whole page."""
    links = [f'<li><a href="#{part.name}">{escape(part.title)}</a></li>' for part in parts]
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>',
        KEY,
        *(_section(part) for part in parts),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _section(part: Part) -> str:
    lines = [f'<section id="{part.name}"><h2>{escape(part.title)}</h2>']
    lines.append(f'<p class="where">{_prose(part.where)}</p>')
    charts = [block for block in part.blocks if isinstance(block, Chart) and block.bars]
    for block in part.blocks:
        if isinstance(block, Table):
            lines.append(_table(block))
        elif isinstance(block, str):
            lines.append(f"<p>{_prose(block)}</p>")
    if charts:
        figures = "\n".join(map(_figure, charts))
        lines.append(f'<div class="charts">{figures}</div>')
    return "\n".join([*lines, "</section>"])


def _figure(chart: Chart) -> str:
    return f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg(chart)}</figure>"


def _prose(text: str) -> str:
    """Between backquotes stands code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    numeric = [_is_numeric([row[place] for row in table.rows]) for place in range(len(table.heads))]
    heads = [_cell("th", head, right) for head, right in zip(table.heads, numeric, strict=True)]
    lines = [f"<tr>{''.join(heads)}</tr>"]
    for row in table.rows:
        cells = [_cell("td", cell, right) for cell, right in zip(row, numeric, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    whole = '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"
    if len(table.rows) <= FOLDED:
        return whole
    return f"<details><summary>All {len(table.rows)} rows</summary>{whole}</details>"


def _is_numeric(cells: Sequence[str]) -> bool:
    shown = [cell for cell in cells if cell and cell != UNMEASURED]
    return bool(shown) and all(NUMERIC.fullmatch(cell) for cell in shown)


def _cell(tag: str, text: str, right: bool) -> str:
    kinds = ["number"] * right + ["no"] * (text == UNMEASURED) + ["long"] * (len(text) > 60)
    marked = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<{tag}{marked}>{escape(text)}</{tag}>"
