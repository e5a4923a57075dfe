"""Two results of one benchmark, before and after: `smtc bench compare A B`.

Rows are joined by what identifies them: all their texts, and the numbers in `NUMBERS`. A time, a
rate or a ratio has changed where its median moved by more than the threshold and the ranges from
the 20th to the 80th percentile do not touch; a peak of memory, which has no range, where it moved
by more than the threshold.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smtc.benchmarks.blocks import Row, Table, is_number, text
from smtc.benchmarks.harness import read_report
from smtc.benchmarks.report import LEARNING, SECTIONS
from smtc.errors import UserError

SIZES = ("positions", "clips", "ranks", "L", "B", "T", "N", "memory_mb", "size", "bits")
NUMBERS = ("threads", "seed", *SIZES)
"""Columns of numbers that identify a row; all others are results."""
RESULTS = ("unit", "error", "law")
"""Columns of text that do not identify a row."""
LOWER = ("ns", "us", "µs", "ms", "s", "MB", "share of the time")
HIGHER = ("times",)
"""Units by what is better, beside everything a second, of which more is better."""
MACHINE = ("cpu", "gpu", "cores", "threads", "amx", "torch", "triton", "driver")

SLOWER, FASTER, NOISE, FAILS = "slower", "faster", "within noise", "fails now"
MORE, LESS = "more memory", "less memory"
WORSE = (SLOWER, MORE, FAILS)

Key = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Change:
    """One number before and after; `worse` is how many times worse it is: 1 where it is alike."""

    name: str
    metric: str
    first: str
    second: str
    percent: str
    worse: float
    verdict: str


def run(before: Path, after: Path, *, threshold: float = 0.05) -> int:
    """Print every change, the worst last, and a line that counts them.

    Args:
        before: a report's JSON file, or a folder of them.
        after: another one.
        threshold: the least relative change that counts.

    Returns:
        the exit code: 1 where something is slower, takes more memory or fails now.
    """
    if not 0 <= threshold < math.inf:
        raise UserError("--threshold is a relative change from 0, as 0.05.")
    pairs = _pairs(before, after)
    changes: list[Change] = []
    alone = Counter[str]()
    told: dict[str, list[str]] = {}
    for name, (old, new) in pairs.items():
        for line in _origins(old, new):
            told.setdefault(line, []).append(name)
        found, missing = compare(old["rows"], new["rows"], threshold)
        changes += [replace(one, name=f"{name} {one.name}") for one in found]
        alone.update(missing)
    if not changes:
        raise UserError(f"{before} and {after} have no measured row in common.")
    for line, names in told.items():
        print(f"{', '.join(names)}: {line}")
    print(f"\n{_aligned(sorted(changes, key=lambda change: change.worse))}")
    print(f"\n{counted(changes, alone)}")
    return 1 if any(change.verdict in WORSE for change in changes) else 0


def _pairs(before: Path, after: Path) -> dict[str, tuple[Row, Row]]:
    """The reports to compare, by name."""
    for path in (before, after):
        if not path.exists():
            raise UserError(f"{path} does not exist; give two JSON files or two folders of them.")
    if before.is_dir() != after.is_dir():
        raise UserError(f"Of {before} and {after} only one is a folder; give two of a kind.")
    if not before.is_dir():
        return {before.stem: (_read(before), _read(after))}
    names = [
        f"{section.name}.json"
        for section in SECTIONS
        if section.name != LEARNING and (before / f"{section.name}.json").is_file()
    ]
    shared = [name for name in names if (after / name).is_file()]
    if len(shared) < len(names):
        print(f"Only in A: {', '.join(name for name in names if name not in shared)}.")
    if not shared:
        raise UserError(f"{before} and {after} have no report in common, such as kernels.json.")
    return {Path(name).stem: (_read(before / name), _read(after / name)) for name in shared}


def _read(path: Path) -> Row:
    found = read_report(path)
    rows, environment = found["rows"], found["environment"]
    if not isinstance(rows, list) or not isinstance(environment, dict):
        raise UserError(f"{path} is no benchmark report: its rows or environment are of no use.")
    return found | {"rows": [row for row in rows if isinstance(row, dict)]}


def _origins(old: Row, new: Row) -> list[str]:
    """A line with the commits, and one with what makes times incomparable."""
    ours, theirs = old["environment"], new["environment"]
    differences = [
        f"{key} {text(ours.get(key)) or 'none'} and {text(theirs.get(key)) or 'none'}"
        for key in MACHINE
        if ours.get(key) != theirs.get(key)
    ]
    lines = [f"A is of commit {old['commit']}, B of {new['commit']}."]
    return [
        *lines,
        *([f"times are not comparable: {'; '.join(differences)}."] if differences else []),
    ]


def _aligned(changes: Sequence[Change]) -> str:
    """A table whose columns are straight on a screen, too."""
    heads = ["row", "of", "A", "B", "change", "verdict"]
    lines = [[c.name, c.metric, c.first, c.second, c.percent, c.verdict] for c in changes]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in [heads, *lines]
    ]
    return Table(padded[0], padded[1:]).markdown()


def compare(
    before: Sequence[Row], after: Sequence[Row], threshold: float
) -> tuple[list[Change], Counter[str]]:
    """The changes of all rows in both, and how many rows are in one alone."""
    old, new = _by_key(before), _by_key(after)
    failed = [key for key, row in new.items() if "error" in row]
    changes: list[Change] = []
    alone = Counter[str]()
    for key, row in old.items():
        if not _measured(row):
            continue
        name = _name(row)
        if _measured(new.get(key, {})):
            changes += [
                change
                for metric in ("median", "peak_mb")
                if (change := _change(name, metric, row, new[key], threshold)) is not None
            ]
        # A row that failed early lacks the columns of what was to come.
        elif any(error <= key for error in failed):
            changes.append(Change(name, "", "measured", "error", "", math.inf, FAILS))
        else:
            alone["only in A"] += 1
    both = {key for key, row in old.items() if _measured(row)}
    alone["only in B"] += sum(_measured(new[key]) for key in new.keys() - both)
    return changes, alone


def _by_key(rows: Sequence[Row]) -> dict[Key, Row]:
    """Rows by what identifies them; equal ones are numbered in their order."""
    found: dict[Key, Row] = {}
    for row in rows:
        key = _identity(row)
        number = 1
        while key in found:
            number += 1
            key = _identity(row) | {("number", str(number))}
        found[key] = row
    return found


def _identity(row: Row) -> Key:
    return frozenset(
        (key, json.dumps(value, sort_keys=True))
        for key, value in row.items()
        if (isinstance(value, str) and key not in RESULTS) or key in NUMBERS or key == "options"
    )


def _measured(row: Row) -> bool:
    return "error" not in row and any(is_number(row.get(key)) for key in ("median", "peak_mb"))


def _name(row: Row) -> str:
    """Texts as they are, numbers with their column."""
    parts = [
        str(value) for key, value in row.items() if isinstance(value, str) and key not in RESULTS
    ]
    parts += [f"{key} {row[key]}" for key in (*NUMBERS, "options") if row.get(key) is not None]
    return " ".join(parts)


def _change(name: str, metric: str, old: Row, new: Row, threshold: float) -> Change | None:
    """None where a row lacks the number, or units differ or are unknown."""
    first, second = old.get(metric), new.get(metric)
    unit = "MB" if metric == "peak_mb" else text(old.get("unit"))
    higher = unit in HIGHER or unit.endswith("/s")
    known = higher or unit in LOWER
    same = metric == "peak_mb" or old.get("unit") == new.get("unit")
    if not (is_number(first) and is_number(second) and known and same):
        return None
    relative = _relative(first, second)
    worse = _relative(second, first) if higher else relative
    moved = abs(second - first) > threshold * abs(first)
    if metric == "median":
        moved = moved and _apart(old, new)
    bad, good = (MORE, LESS) if metric == "peak_mb" else (SLOWER, FASTER)
    verdict = NOISE if not moved else bad if worse > 1 else good
    shown = [f"{_digits(value)} {unit}" for value in (first, second)]
    return Change(
        name, metric, shown[0], shown[1], f"{100 * (relative - 1):+.1f} %", worse, verdict
    )


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _relative(first: float, second: float) -> float:
    if first == second:
        return 1.0
    return second / first if first else math.inf


def _apart(old: Row, new: Row) -> bool:
    """Whether the ranges of two rows do not touch; a row without one has its median alone."""
    ranges: list[tuple[Any, Any]] = []
    for row in (old, new):
        low, high = row.get("p20"), row.get("p80")
        both = is_number(low) and is_number(high)
        ranges.append((low, high) if both else (row["median"], row["median"]))
    (first_low, first_high), (second_low, second_high) = ranges
    return bool(first_high < second_low or second_high < first_low)


def counted(changes: Sequence[Change], alone: Counter[str]) -> str:
    """How many changes there are of each kind, and how many rows have no other."""
    verdicts = Counter(change.verdict for change in changes)
    said = [f"{verdicts[verdict]} {verdict}" for verdict in (SLOWER, FASTER)]
    said += [
        f"{verdicts[verdict]} {verdict}" for verdict in (MORE, LESS, FAILS) if verdicts[verdict]
    ]
    said.append(f"{verdicts[NOISE]} {NOISE}")
    said += [f"{number} {where}" for where, number in alone.items() if number]
    return ", ".join(said)
