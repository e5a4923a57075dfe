"""The rows of kernels, static, tune, data and learning as tables and charts.

Rows may lack columns, as those of a benchmark of another version do: the cell is then empty.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from smtc.benchmarks.blocks import (
    EAGER,
    OTHER,
    OWN,
    UNMEASURED,
    Bar,
    Block,
    Chart,
    Columns,
    Row,
    Table,
    failures,
    is_number,
    known,
    listed,
    number,
    of_kind,
    settings,
    spread,
    text,
)
from smtc.benchmarks.cases import OPERATIONS, SETTINGS

BEST_PLAIN = ("eager-bf16", "eager-fp32")
ORDER = ("triton", *BEST_PLAIN, "compile", "plain", "scipy", "pot")
COLOURS = {"triton": OWN, "torch": OWN, "cache": OWN, "dali": OWN, "opencv": EAGER}
COLOURS |= dict.fromkeys((*BEST_PLAIN, "compile"), EAGER)
STAGES = {"masked_slot_attention": (" semantic", " instance")}
"""What follows the size in the names of an operation's cases, where it has several."""

TARGETS = {
    "correlation_projection": (1.3, 1.0, 1.0),
    "masked_slot_attention": (3.0, 3.0, 3.0),
    "transport_alignment": (10.0, 10.0, 10.0),
    "instance_consistency": (20.0, 20.0, 20.0),
}
"""How many times faster than eager the kernels are to be at each of `SETTINGS`, both ways."""

SCORES = ("ari", "fg_iou", "miou", "fg_ari", "instance_ari", "instance_miou")

KERNEL_LEGEND = (
    "Median milliseconds of a call, in brackets of a replayed CUDA graph. L: positions a frame; "
    "plain: the equations, literally; triton / eager: how many times faster than the best eager "
    "form; of roofline: the kernels' share of the measured ceilings."
)


def summary(rows: Sequence[Row]) -> Table:
    """The kernels at the paper's sizes, forward and backward together (forward alone where there is
    no gradient): time, and how many times faster than the best eager form and than the literal one.
    """
    lines = []
    for op in OPERATIONS:
        for stage in STAGES.get(op, ("",)):
            cells = [_summary_cell(rows, op, f"L{positions}{stage}") for positions in SETTINGS]
            lines.append([f"{op}{stage and ',' + stage}", *cells, _target(op)])
    return Table(["operation", *(f"L = {positions}" for positions in SETTINGS), "target"], lines)


def _target(op: str) -> str:
    if op not in TARGETS:
        return ""
    ratios = [f"{ratio:g}" for ratio in TARGETS[op]]
    shown = ratios[0] if len(set(ratios)) == 1 else " / ".join(ratios)
    return f"{shown}x eager"


def _summary_cell(rows: Sequence[Row], op: str, case: str) -> str:
    own = [row for row in _launched(rows) if (row.get("op"), row.get("case")) == (op, case)]
    for direction in ("both", "forward"):
        medians = _medians([row for row in own if row.get("direction") == direction])
        if medians:
            break
    if "triton" not in medians:
        return UNMEASURED
    fused = medians["triton"]
    cell = f"{fused:.3g} ms"
    eager = [medians[name] for name in BEST_PLAIN if name in medians]
    if eager:
        cell += f", {min(eager) / fused:.1f}x eager"
    if "plain" in medians:
        cell += f", {medians['plain'] / fused:.1f}x plain"
    return cell


def _launched(rows: Sequence[Row]) -> list[Row]:
    """The times that include the launches."""
    return [row for row in rows if row.get("mode") == "launch" and is_number(row.get("median"))]


def _medians(rows: Sequence[Row]) -> dict[str, float]:
    return {text(row.get("provider")): row["median"] for row in rows}


def kernel_blocks(rows: Sequence[Row]) -> list[Block]:
    """Times in milliseconds, a graph's replay in brackets, what was not timed, and bars."""
    timed = [row for row in rows if "mode" in row and is_number(row.get("median"))]
    providers = [name for name in ORDER if any(row.get("provider") == name for row in timed)]
    heads = ["operation", "case", "direction", *providers, "triton / eager", "of roofline"]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in timed:
        groups.setdefault((*_case(row), text(row.get("direction"))), []).append(row)
    lines = []
    for key in sorted(groups, key=lambda key: _rank(key[0])):
        cells = [_times(groups[key], provider) for provider in providers]
        lines.append([*key, *cells, _speedup(groups[key]), _share(groups[key])])
    ceilings = [
        f"{row.get('case')} {number(row.get('median'), '.4g')} {text(row.get('unit'))}"
        for row in rows
        if "op" not in row
    ]
    return [
        KERNEL_LEGEND,
        *([f"Measured ceilings: {', '.join(ceilings)}."] if ceilings else []),
        *([Table(heads, lines)] if lines else []),
        *failures(rows, ("op", "case", "direction", "mode", "provider")),
        *_kernel_charts(rows),
    ]


def _case(row: Row) -> tuple[str, str]:
    return text(row.get("op")), text(row.get("case"))


def _rank(op: str) -> int:
    return OPERATIONS.index(op) if op in OPERATIONS else len(OPERATIONS)


def _times(rows: Sequence[Row], provider: str) -> str:
    medians = {row["mode"]: row["median"] for row in rows if row.get("provider") == provider}
    cell = number(medians.get("launch"))
    return cell + (f" ({medians['graph']:.3g})" if "graph" in medians else "")


def _speedup(rows: Sequence[Row]) -> str:
    """How many times faster than the best eager form the kernels are."""
    medians = _medians(_launched(rows))
    eager = [medians[name] for name in BEST_PLAIN if name in medians]
    return f"{min(eager) / medians['triton']:.2f}x" if eager and "triton" in medians else ""


def _share(rows: Sequence[Row]) -> str:
    """The best provider's share of the roofline."""
    shares = [share for row in rows if (share := known(row, "percent_of_roofline"))]
    return f"{max(shares):.0f} %" if shares else ""


def _kernel_charts(rows: Sequence[Row]) -> list[Block]:
    """Every provider's time, a chart an operation and case; forward and backward together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _launched(rows):
        groups.setdefault(_case(row), []).append(row)
    charts: list[Block] = []
    for (op, case), group in sorted(groups.items(), key=lambda item: _rank(item[0][0])):
        both = [row for row in group if row.get("direction") == "both"]
        what = "forward + backward" if both else "forward"
        charts.append(Chart(f"{op} {case}, {what}, ms", _bars(both or group, "provider")))
    return charts


def _bars(rows: Sequence[Row], label: str, form: str = ".3g") -> list[Bar]:
    """The medians with their ranges, named by a column."""
    return [
        Bar(
            text(row.get(label)),
            row["median"],
            number(row["median"], form),
            known(row, "p20"),
            known(row, "p80"),
            COLOURS.get(text(row.get("provider")), OTHER),
        )
        for row in rows
        if is_number(row.get("median"))
    ]


def static_blocks(rows: Sequence[Row]) -> list[Block]:
    """The largest need of each operation's kernels on each architecture, and what is over."""
    columns = ("registers", "spill_bytes", "shared_bytes", "tensor_core_instructions")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((text(row.get("op")), text(row.get("arch"))), []).append(row)
    lines = [
        [*key, *(_most([row.get(column) for row in group]) for column in columns)]
        for key, group in groups.items()
    ]
    over: Columns = {
        "over its budget": lambda row: f"{row.get('kernel')} {row.get('case')} {row.get('arch')}",
        "by": lambda row: ", ".join(map(str, row["over"])),
    }
    heads = ["operation", "GPU", *(column.replace("_", " ") for column in columns)]
    return [
        *([Table(heads, lines)] if lines else []),
        *listed([row for row in rows if row.get("over")], over),
    ]


def _most(values: Sequence[Any]) -> str:
    numbers = [value for value in values if is_number(value)]
    return f"{max(numbers):g}" if numbers else ""


def tune_blocks(rows: Sequence[Row]) -> list[Block]:
    """What was tried for each row of the launch table, the best last."""

    def options(row: Row) -> str:
        found = row.get("options")
        pairs = found.items() if isinstance(found, dict) else ()
        return ", ".join(f"{name} {value}" for name, value in pairs)

    columns: Columns = {
        "kernel": "kernel",
        "GPU": "arch",
        "bits": "bits",
        "size": "size",
        "options": options,
        "ms": lambda row: number(row.get("median"), ".4g") or text(row.get("error")),
        "": lambda row: "chosen" if row.get("chosen") else "",
    }
    return [*listed(rows, columns)]


def data_blocks(rows: Sequence[Row]) -> list[Block]:
    """What `smtc bench data` found: rates, ratios, waits, what could not be measured, and bars."""
    rates: Columns = {
        "frames": "case",
        "loader": "provider",
        "decodes on": "device",
        "workers": "threads",
        "clips/s (20 % – 80 %)": lambda row: spread(row, ".1f"),
        "source frames/s": lambda row: number(row.get("frames_per_s"), ".0f"),
        "CPU ms a clip": lambda row: number(row.get("cpu_ms_per_clip"), ".1f"),
        "KB a frame": lambda row: number(row.get("bytes_per_frame"), ".0f", 1e-3),
    }
    ratios: Columns = {
        "frames": "case",
        "clips/s of": "provider",
        "workers": "threads",
        "times (20 % – 80 %)": lambda row: spread(row, ".2f"),
        "target": lambda row: f"≥ {row['target']}" if "target" in row else "",
        "by CPU time": lambda row: number(row.get("cpu_ratio"), ".2f"),
    }
    waits: Columns = {
        "training on": "case",
        "loader": "provider",
        "workers": "threads",
        "share of the time spent waiting": lambda row: number(row.get("median"), ".0%"),
    }
    return [
        *settings(rows),
        *listed(of_kind(rows, "rate"), rates),
        *listed(of_kind(rows, "ratio"), ratios),
        *listed(of_kind(rows, "wait"), waits),
        *failures(rows, ("case", "provider", "device", "threads")),
        *_data_charts(of_kind(rows, "rate")),
    ]


def _data_charts(rates: Sequence[Row]) -> list[Block]:
    """Clips a second, a chart a number of workers."""
    charts: list[Block] = []
    for threads in dict.fromkeys(row.get("threads") for row in rates):
        own = [row for row in rates if row.get("threads") == threads]
        named = [row | {"name": _loader(row)} for row in own]
        charts.append(Chart(f"clips/s with {threads} workers", _bars(named, "name", ".0f")))
    return charts


def _loader(row: Row) -> str:
    where = " on GPU" if row.get("device") not in (None, "cpu") else ""
    return f"{text(row.get('case'))} {text(row.get('provider'))}{where}".strip()


def learning_table(by_name: Mapping[str, Sequence[Row]]) -> Table:
    """A row a model; the scores of seeds that differ stand side by side."""
    lines = [
        [name, *(_side_by_side([row.get(score) for row in rows]) for score in SCORES)]
        for name, rows in by_name.items()
    ]
    return Table(["", *SCORES], lines)


def _side_by_side(values: Sequence[Any]) -> str:
    shown = [number(value, ".2f") for value in values]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def learning_blocks(by_name: Mapping[str, Sequence[Row]]) -> list[Block]:
    """The table, and bars of each model's mean over the seeds."""
    charts: list[Block] = []
    for score in SCORES[:3]:
        bars = []
        for name, rows in by_name.items():
            values = [row[score] for row in rows if is_number(row.get(score))]
            if values:
                mean = sum(values) / len(values)
                colour = OWN if name == "trained" else EAGER if "warm" in name else OTHER
                bars.append(Bar(name, mean, f"{mean:.2f}", min(values), max(values), colour))
        charts.append(Chart(f"{score}, mean and range of the seeds", bars))
    return [learning_table(by_name), *charts]
