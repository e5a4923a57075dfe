"""All results in a folder as one HTML page and as text: `smtc bench report`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smtc.benchmarks import page, parity, step_tables, tables
from smtc.benchmarks.blocks import UNMEASURED, Block, Row, markdown, text
from smtc.benchmarks.harness import read_report, write_whole
from smtc.errors import UserError

RESULTS = Path(__file__).resolve().parent / "results"
"""The checkout's recorded results; an installed package has none."""
LEARNING = "learning"
Report = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A benchmark: its file is NAME.json."""

    name: str
    title: str
    about: str
    blocks: Callable[[Any], list[Block]]
    on_gpu: bool = True
    """Whether its numbers are others on a GPU."""

    @property
    def command(self) -> str:
        """What writes the file."""
        made = f"smtc bench {self.name} --output build/bench"
        return "make learning-table" if self.name == LEARNING else made


def parity_blocks(rows: list[Row]) -> list[Block]:
    """The worst errors, below what they mean."""
    checked = [f"{text(row.get('provider'))} on {text(row.get('device'))}" for row in rows]
    what = (
        f"Checked: {', '.join(dict.fromkeys(checked))}. On a CPU, triton runs in its interpreter."
    )
    return [what, parity.LEGEND, parity.table(rows)]


def kernel_blocks(rows: list[Row]) -> list[Block]:
    """At the paper's sizes, then in full."""
    return [tables.summary(rows), *tables.kernel_blocks(rows)]


SECTIONS = (
    Section("step", "A training step", "Whole steps of training, by provider.",
            step_tables.step_blocks),
    Section("memory", "Memory", "The most memory that a step holds, and what fits.",
            step_tables.memory_blocks),
    Section("scaling", "Many processes", "Steps on more than one process: weak scaling has as "
            "many clips for each, strong scaling as many in all.", step_tables.scaling_blocks),
    Section("profile", "Where the device's time goes", "Kernels of a step by their share.",
            step_tables.profile_blocks),
    Section("kernels", "Times of the operations", "Each operation by each provider.",
            kernel_blocks),
    Section("parity", "Errors of the operations", "Each operation and dtype against float64.",
            parity_blocks),
    Section("static", "The kernels, compiled", "What the kernels need on GPUs, compiled without "
            "one: the largest of each operation.", tables.static_blocks, on_gpu=False),
    Section("tune", "Launch options", "What the search on a GPU tried.", tables.tune_blocks,
            on_gpu=False),
    Section("data", "Loaders", "Clips a second of each loader.", tables.data_blocks),
    Section(LEARNING, "What training reaches", "Scores on held-out synthetic videos, a value a "
            "seed where they differ.", tables.learning_blocks, on_gpu=False),
    Section("quality", "Quality by provider", "The same training by different providers.",
            step_tables.quality_blocks, on_gpu=False),
)  # fmt: skip
"""In the order of the page."""


def run(folder: Path | None = None, *, output: Path | None = None) -> int:
    """Print the folder's results as text and write them as a page.

    Args:
        folder: with the JSON files; None: the checkout's recorded results.
        output: the page; None: report.html in the folder.

    Returns:
        the exit code 0. `UserError` where the folder holds no results.
    """
    folder = chosen(folder)
    found = collect(folder)
    if not found:
        known = ", ".join(f"{section.name}.json" for section in SECTIONS)
        raise UserError(
            f"{folder} holds none of {known}; `smtc bench parity --output DIR` writes one."
        )
    shown = parts(found)
    target = folder / "report.html" if output is None else output
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The page {target} will be HTML; choose a name that ends in .html.")
    write_whole(target, page.html("SMTC: benchmarks", shown))
    for part in shown:
        if part.name in found:
            print(f"## {part.title}\n\n{part.where}\n\n{markdown(part.blocks)}\n")
    print(f"The report is in {target}.")
    return 0


def chosen(folder: Path | None) -> Path:
    """The folder, or the checkout's results where none is named."""
    if folder is None and not RESULTS.is_dir():
        raise UserError("Name the folder with the results; an installed package has none.")
    return RESULTS if folder is None else folder


def collect(folder: Path) -> dict[str, Report]:
    """What the known files of a folder contain, by benchmark."""
    paths = {section.name: folder / f"{section.name}.json" for section in SECTIONS}
    return {name: read(path) for name, path in paths.items() if path.is_file()}


def read(path: Path) -> Report:
    """A benchmark's file; that of learning has rows by model and versions as environment.

    `UserError` where it is something else.
    """
    if path.stem != LEARNING:
        found = read_report(path)
        rows = found["rows"]
        sound = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    else:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = found["rows"].values()
            found.setdefault("environment", found.get("versions", {}))
            sound = all(isinstance(row, dict) for models in rows for row in models)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no table of learning ({error!r}).") from error
    if not sound or not isinstance(found["environment"], dict):
        raise UserError(f"{path} is no benchmark report: its rows or environment are of no use.")
    return found


def parts(found: dict[str, Report]) -> list[page.Part]:
    """Every section of the page, those without results too."""
    shown = []
    for section in SECTIONS:
        command = f"`{section.command}`"
        if section.name in found:
            report = found[section.name]
            where = f"{command} writes this; the numbers are of {machine(report)}."
            blocks = [section.about, *filled(section, report)]
        else:
            where = f"{command} writes this."
            blocks = [section.about, UNMEASURED]
        shown.append(page.Part(section.name, section.title, where, blocks))
    return shown


def filled(section: Section, report: Report) -> list[Block]:
    """The blocks of a section, and a line where a GPU's numbers are missing."""
    lacking = section.on_gpu and not report["environment"].get("gpu")
    blocks = section.blocks(report["rows"]) or ["The file holds no rows."]
    return [*blocks, *([f"On a GPU: {UNMEASURED}."] if lacking else [])]


def machine(report: Report) -> str:
    """Where a report was made: processor, versions, commit."""
    environment = report["environment"]
    cpu = environment.get("cpu")
    cores = [f"{environment[key]} {key}" for key in ("cores", "threads") if environment.get(key)]
    amx = {True: "with AMX", False: "without AMX"}.get(environment.get("amx"))
    processor = ", ".join(filter(None, [cpu, *cores, amx])) or "a machine that was not recorded"
    gpu = [
        f"{name} {environment[key]}"
        for key, name in (("driver", "driver"), ("cuda", "CUDA"))
        if environment.get(key)
    ]
    graphics = ", ".join(filter(None, [environment.get("gpu"), *gpu]))
    names = {"torch": "torch", "triton": "Triton", "python": "Python"}
    versions = [f"{name} {environment[key]}" for key, name in names.items() if environment.get(key)]
    listed = [graphics, processor, ", ".join(versions), f"commit {short(report)}"]
    return "; ".join(filter(None, listed))


def short(report: Report) -> str:
    """The commit in twelve letters, and whether anything was changed in it."""
    name, dash, dirty = text(report.get("commit")).partition("-")
    return name[:12] + dash + dirty
