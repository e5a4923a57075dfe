"""What a report is made of: paragraphs, tables and charts. A table is written once and shown as
markdown or HTML.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Row = dict[str, Any]
Columns = Mapping[str, str | Callable[[Row], str]]
"""By head: the key of a row's value, or what makes the cell of a row."""
UNMEASURED = "not yet measured"
_SETTINGS = "settings"
OWN, EAGER, OTHER = "own", "eager", "other"
"""What a bar stands for: the fused kernels and our loaders, the best plain form, the rest."""


@dataclass(frozen=True)
class Table:
    """Heads and rows of cells that are text already."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As GitHub reads it."""
        lines = [self.heads, *self.rows]
        head, *rest = (f"| {' | '.join(map(_in_markdown, line))} |" for line in lines)
        return "\n".join([head, "|---" * len(self.heads) + "|", *rest])


@dataclass(frozen=True)
class Bar:
    """One bar with its name before it, its value as text behind it, and the range it varied in."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    colour: str = OTHER


@dataclass(frozen=True)
class Chart:
    """Bars on one scale that begins at zero."""

    title: str
    bars: Sequence[Bar]


Block = str | Table | Chart


def markdown(blocks: Sequence[Block]) -> str:
    """Paragraphs and tables; charts are left to the page."""
    shown = [block for block in blocks if not isinstance(block, Chart)]
    return "\n\n".join(b.markdown() if isinstance(b, Table) else b for b in shown)


def _in_markdown(cell: str) -> str:
    return re.sub(r"([|<])", r"\\\1", re.sub(r"\s*\n\s*", " ", cell))


def number(value: Any, form: str = ".3g", scale: float = 1) -> str:
    """A number as text; nothing for what is none."""
    return format(value * scale, form) if is_number(value) else ""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it can be calculated with: JSON's true and false cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def known(row: Row, key: str) -> float | None:
    """A row's number, where it has one."""
    value = row.get(key)
    return value if is_number(value) else None


def spread(row: Row, form: str = ".3g") -> str:
    """The median with the range of the middle 60 %, where the row has one."""
    median, low, high = (number(row.get(key), form) for key in ("median", "p20", "p80"))
    return f"{median} ({low} – {high})" if low and high else median


def milliseconds(value: Any) -> str:
    """With at least three digits and without an exponent."""
    return number(value, ".0f" if is_number(value) and abs(value) >= 100 else ".3g")


def listed(rows: Sequence[Row], columns: Columns) -> list[Table]:
    """A table of rows. A column without any content is left out, and so is an empty table."""
    makers = [_maker(column) for column in columns.values()]
    cells = [[maker(row) for maker in makers] for row in rows]
    kept = [place for place in range(len(makers)) if any(line[place] for line in cells)]
    heads = list(columns)
    shown = [[line[place] for place in kept] for line in cells]
    return [Table([heads[place] for place in kept], shown)] if shown and kept else []


def _maker(column: str | Callable[[Row], str]) -> Callable[[Row], str]:
    return (lambda row: text(row.get(column))) if isinstance(column, str) else column


def text(value: Any) -> str:
    """A cell's content; nothing for null."""
    return "" if value is None else str(value)


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of a kind that were measured."""
    return [row for row in rows if row.get("kind") == kind and "error" not in row]


def failures(rows: Sequence[Row], columns: Sequence[str]) -> list[Table]:
    """What could not be measured, named by its texts and by its numbers with their heads; why."""

    def name(row: Row) -> str:
        parts = [
            f"{column} {row[column]}" if is_number(row[column]) else str(row[column])
            for column in columns
            if row.get(column) is not None
        ]
        return " ".join(parts)

    failed = [row for row in rows if "error" in row]
    return listed(failed, {"could not be measured": name, "because": "error"})


def settings(rows: Sequence[Row]) -> list[str]:
    """What all rows have in common, as a paragraph."""
    found = [row for row in rows if _SETTINGS in (row.get("kind"), row.get("case"))]
    told = [
        ", ".join(f"{key} {value}" for key, value in row.items() if value != _SETTINGS)
        for row in found
    ]
    return [f"Settings: {line}." for line in told]
