"""The README's tables, from the JSON files: `smtc bench report --readme README.md`.

What lies between a line `<!-- table: NAME -->` and the next `<!-- end -->` belongs to this module.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smtc import compatibility
from smtc.benchmarks import parity, report, step_tables, tables
from smtc.benchmarks.blocks import UNMEASURED, Block, markdown
from smtc.benchmarks.harness import write_whole
from smtc.errors import UserError

START = re.compile(r"<!-- table: (.*?) -->")
END = "<!-- end -->"

TABLES: dict[str, tuple[str, Callable[[Any], list[Block]]]] = {
    "learning": ("learning", lambda rows: [tables.learning_table(rows)]),
    "data": ("data", tables.data_blocks),
    "parity": ("parity", lambda rows: [parity.table(rows)]),
    "step": ("step", lambda rows: [*step_tables.providers_tables(rows)]),
    "phases": ("step", lambda rows: [*step_tables.phase_tables(rows)]),
    "ablations": ("step", lambda rows: [*step_tables.ablation_tables(rows)]),
    "memory": ("memory", step_tables.memory_summary),
    "quality": ("quality", lambda rows: [*step_tables.quality_tables(rows)]),
    "scaling": ("scaling", step_tables.scaling_blocks),
    "profile": ("profile", step_tables.profile_blocks),
}
"""By name: the benchmark and what is shown. `kernels` is apart, as it is also shown
unmeasured, and so is `options`, which nothing measures."""


def run(readme: Path, folder: Path | None = None) -> int:
    """Rewrite the tables of a file from the results in a folder; see `report.run`.

    Returns the exit code 0. `UserError` where the file has no marks, or wrong ones.
    """
    try:
        before = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{readme} cannot be read ({error}).") from error
    found = report.collect(report.chosen(folder))
    try:
        after = filled(before, found)
    except ValueError as error:
        raise UserError(f"{readme}: {error}") from error
    if after != before:
        write_whole(readme, after)
    print(f"The tables of {readme} {'are new' if after != before else 'were up to date'}.")
    return 0


def filled(text: str, found: dict[str, report.Report]) -> str:
    """The text with its tables made anew. `ValueError` where a mark is wrong."""
    parts, place = [], 0
    for start in START.finditer(text):
        end = text.find(END, start.end())
        following = START.search(text, start.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f"after {start[0]} {END} is missing.")
        parts += [text[place : start.end()], f"\n{content(start[1], found)}\n"]
        place = end
    if not parts:
        raise ValueError("it has no line <!-- table: NAME -->, so there is nothing to write.")
    return "".join([*parts, text[place:]])


def content(name: str, found: dict[str, report.Report]) -> str:
    """What stands between the marks of a table."""
    if name == "options":
        return compatibility.table()
    if name == "kernels":
        return tables.summary(found["kernels"]["rows"] if name in found else []).markdown()
    if name not in TABLES:
        known = sorted([*TABLES, "kernels", "options"])
        raise ValueError(f"there is no table {name!r}; there are {', '.join(known)}.")
    benchmark, blocks = TABLES[name]
    (section,) = (section for section in report.SECTIONS if section.name == benchmark)
    shown = blocks(found[benchmark]["rows"]) if benchmark in found else []
    if not shown:
        return f"{UNMEASURED}: `{section.command}`"
    lacking = section.on_gpu and not found[benchmark]["environment"].get("gpu")
    return markdown([*shown, *([f"On a GPU: {UNMEASURED}."] if lacking else [])])
