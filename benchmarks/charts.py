"""A chart as SVG inside a page: horizontal bars, each below its name. They grow with the width
of the page while letters keep their size; colours come from the page's style sheet.
"""

from html import escape

from smtc.benchmarks.blocks import Bar, Chart

ROW, THICK = 36, 12
"""Pixels from bar to bar, and of a bar."""
LONGEST = 70.0
"""Percent of the width that the longest bar takes; the rest is for its value."""


def svg(chart: Chart) -> str:
    """The bars without the title, which the page writes above them."""
    most = max((_end(bar) for bar in chart.bars), default=0.0)
    scale = LONGEST / most if most > 0 else 0.0
    rows = [_row(bar, place * ROW, scale) for place, bar in enumerate(chart.bars)]
    name, height = escape(chart.title), ROW * len(chart.bars)
    head = f'<svg role="img" aria-label="{name}" width="100%" height="{height}">'
    return "\n".join([head, *rows, "</svg>"])


def _end(bar: Bar) -> float:
    return bar.value if bar.high is None else max(bar.value, bar.high)


def _row(bar: Bar, top: int, scale: float) -> str:
    def along(value: float) -> str:
        return f"{max(0.0, scale * value):.3f}%"

    middle = top + 24
    where = f'y="{middle - THICK // 2}" height="{THICK}"'
    parts = [
        f"<title>{escape(f'{bar.label}: {bar.text}')}</title>",
        f'<text x="0" y="{top + 13}">{escape(bar.label)}</text>',
        f'<rect class="{bar.colour}" x="0" width="{along(bar.value)}" {where}/>',
    ]
    if bar.low is not None and bar.high is not None:
        ends = f'x1="{along(bar.low)}" x2="{along(bar.high)}"'
        parts.append(f'<line {ends} y1="{middle}" y2="{middle}"/>')
    value = f'x="{along(_end(bar))}" dx="6" y="{middle + 4}"'
    parts.append(f'<text class="value" {value}>{escape(bar.text)}</text>')
    return f"<g>{''.join(parts)}</g>"
