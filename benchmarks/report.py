"""The JSON files of a benchmark folder as tables and a picture: `smtc bench report DIR`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smtc.benchmarks import parity
from smtc.benchmarks.cases import OPERATIONS, SETTINGS
from smtc.benchmarks.harness import read_report, write_whole
from smtc.errors import UserError

Row = dict[str, Any]
UNMEASURED = "not yet measured"
EAGER = ("eager-bf16", "eager-fp32")
ORDER = ("triton", "eager-bf16", "eager-fp32", "compile", "plain", "scipy", "pot")
STAGES = {"masked_slot_attention": (" semantic", " instance")}
"""What follows the size in the names of an operation's cases, where it has several."""

TARGETS = {
    "correlation_projection": (1.3, 1.0, 1.0),
    "masked_slot_attention": (3.0, 3.0, 3.0),
    "transport_alignment": (10.0, 10.0, 10.0),
    "instance_consistency": (20.0, 20.0, 20.0),
}
"""How many times faster than eager the kernels are to be at each of `SETTINGS`, both ways."""


def run(folder: Path) -> int:
    """Print the tables of the folder's JSON files; write report.md and pictures there.

    `UserError` where the folder holds none of them. Returns the exit code 0.
    """
    found = {
        name: read_report(folder / f"{name}.json")
        for name in ("kernels", "parity", "static", "tune", "data")
        if (folder / f"{name}.json").is_file()
    }
    if not found:
        raise UserError(
            f"{folder} holds no kernels.json, parity.json, static.json, tune.json or data.json; "
            "`smtc bench kernels --output` writes one."
        )
    text = "\n\n".join(_sections(found)) + "\n"
    write_whole(folder / "report.md", text)
    print(text)
    if "kernels" in found:
        _draw(found["kernels"]["rows"], folder / "kernels.png")
    if "data" in found:
        draw_data(found["data"]["rows"], folder / "data.png")
    print(f"The report is in {folder / 'report.md'}.")
    return 0


def _sections(found: dict[str, Any]) -> list[str]:
    parts = ["# Benchmarks"]
    for name, report in found.items():
        rows = report["rows"]
        parts += [f"## {name}", _where(report)]
        if name == "kernels":
            parts += [summary(rows), kernel_tables(rows)]
        elif name == "parity":
            parts += [parity.LEGEND, parity.table(rows)]
        elif name == "static":
            parts.append(static_table(rows))
        elif name == "data":
            parts.append(data_table(rows))
        else:
            parts.append(tuned_table(rows))
    return parts


def _where(report: dict[str, Any]) -> str:
    environment = report["environment"]
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['cores']} cores"
    versions = f"torch {environment['torch']}, Triton {environment['triton']}"
    return f"{machine}; {versions}; commit {report['commit']}"


def summary(rows: Sequence[Row]) -> str:
    """The kernels at the paper's sizes, forward and backward together (forward alone where there is
    no gradient): time, and how many times faster than the best eager form and than the literal one.
    """
    heads = [f"L = {positions}" for positions in SETTINGS]
    lines = ["| operation | " + " | ".join(heads) + " | target |", "|---" * (len(heads) + 2) + "|"]
    for op in OPERATIONS:
        for stage in STAGES.get(op, ("",)):
            cells = [_summary_cell(rows, op, f"L{positions}{stage}") for positions in SETTINGS]
            lines.append(f"| {op}{stage and ',' + stage} | {' | '.join(cells)} | {_target(op)} |")
    return "\n".join(lines)


def _target(op: str) -> str:
    if op not in TARGETS:
        return ""
    ratios = [f"{ratio:g}" for ratio in TARGETS[op]]
    shown = ratios[0] if len(set(ratios)) == 1 else " / ".join(ratios)
    return f"{shown}x eager"


def _summary_cell(rows: Sequence[Row], op: str, case: str) -> str:
    medians = _medians(rows, op, case, "both") or _medians(rows, op, case, "forward")
    if "triton" not in medians:
        return UNMEASURED
    own = medians["triton"]
    cell = f"{own:.3g} ms"
    eager = [medians[name] for name in EAGER if name in medians]
    if eager:
        cell += f", {min(eager) / own:.1f}x eager"
    if "plain" in medians:
        cell += f", {medians['plain'] / own:.1f}x plain"
    return cell


def _medians(rows: Sequence[Row], op: str, case: str, direction: str) -> dict[str, float]:
    """By provider, with the launches included."""
    return {
        row["provider"]: row["median"]
        for row in rows
        if (row.get("op"), row["case"], row.get("direction")) == (op, case, direction)
        and row.get("mode") == "launch"
        and "median" in row
    }


def kernel_tables(rows: Sequence[Row]) -> str:
    """Times in milliseconds, a graph's replay in brackets, and below them what was not timed."""
    timed = [row for row in rows if "mode" in row and "median" in row]
    providers = [name for name in ORDER if any(row["provider"] == name for row in timed)]
    lines = [
        f"| operation | case | | {' | '.join(providers)} | triton / eager | of roofline |",
        "|---" * (5 + len(providers)) + "|",
    ]
    keys = dict.fromkeys((row["op"], row["case"], row["direction"]) for row in timed)
    for op, case, direction in sorted(keys, key=lambda key: OPERATIONS.index(key[0])):
        own = [
            row
            for row in timed
            if (row["op"], row["case"], row["direction"]) == (op, case, direction)
        ]
        cells = [_times(own, provider) for provider in providers]
        cells += [_speedup(own), _share(own)]
        lines.append(f"| {op} | {case} | {direction} | {' | '.join(cells)} |")
    ceilings = [
        "Median milliseconds of a call, in brackets of a replayed CUDA graph. L: positions a "
        "frame; plain: the equations, literally; triton / eager: how many times faster than the "
        "best eager form; of roofline: the kernels' share of the measured ceilings.",
        "",
    ]
    ceilings += [
        f"Measured ceilings: {row['case']} {row['median']:.4g} {row['unit']}."
        for row in rows
        if "op" not in row
    ]
    failures = [
        f"* {row['op']} {row['case']} {row.get('direction', '')} {row['provider']}: {row['error']}"
        for row in rows
        if "error" in row
    ]
    return "\n".join([*ceilings, "", *lines, *([""] if failures else []), *failures])


def _times(rows: Sequence[Row], provider: str) -> str:
    medians = {row["mode"]: row["median"] for row in rows if row["provider"] == provider}
    cell = f"{medians['launch']:.3g}" if "launch" in medians else ""
    return cell + (f" ({medians['graph']:.3g})" if "graph" in medians else "")


def _speedup(rows: Sequence[Row]) -> str:
    """How many times faster than the best eager form the kernels are."""
    medians = {row["provider"]: row["median"] for row in rows if row["mode"] == "launch"}
    eager = [medians[name] for name in EAGER if name in medians]
    return f"{min(eager) / medians['triton']:.2f}x" if eager and "triton" in medians else ""


def _share(rows: Sequence[Row]) -> str:
    """The best provider's share of the roofline."""
    shares = [row["percent_of_roofline"] for row in rows if row.get("percent_of_roofline")]
    return f"{max(shares):.0f} %" if shares else ""


def static_table(rows: Sequence[Row]) -> str:
    """The largest need of each operation's kernels on each architecture."""
    columns = ("registers", "spill_bytes", "shared_bytes", "tensor_core_instructions")
    lines = [
        "| operation | GPU | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for op, arch in dict.fromkeys((row["op"], row["arch"]) for row in rows):
        own = [row for row in rows if (row["op"], row["arch"]) == (op, arch)]
        cells = [_most([row.get(column) for row in own]) for column in columns]
        lines.append(f"| {op} | {arch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _most(values: Sequence[Any]) -> str:
    numbers = [value for value in values if isinstance(value, int | float)]
    return f"{max(numbers):g}" if numbers else ""


def tuned_table(rows: Sequence[Row]) -> str:
    """What was tried for each row of the launch table, the best last."""
    lines = ["| kernel | GPU | bits | size | options | ms | |", "|---" * 7 + "|"]
    for row in rows:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        time = f"{row['median']:.4g}" if row.get("median") is not None else row.get("error", "")
        where = f"{row['kernel']} | {row['arch']} | {row['bits']} | {row['size']}"
        lines.append(f"| {where} | {options} | {time} | {'chosen' if row['chosen'] else ''} |")
    return "\n".join(lines)


def data_table(rows: Sequence[Row]) -> str:
    """What `smtc bench data` found: rates, ratios, waits, and what could not be measured."""
    settings = next((row for row in rows if row["case"] == "settings"), {})
    told = [f"{name} {value}" for name, value in settings.items() if name != "case"]
    lines = [
        f"Settings: {', '.join(told)}.",
        "",
        "| frames | loader | decodes on | workers | clips/s (20 % – 80 %) | source frames/s "
        "| CPU ms a clip | KB a frame |",
        "|---" * 8 + "|",
    ]
    for row in _of_kind(rows, "rate"):
        cells = [row["case"], row["provider"], row["device"], row["threads"], _spread(row, ".1f")]
        cells += [format(row["frames_per_s"], ".0f"), format(row["cpu_ms_per_clip"], ".1f")]
        cells.append(format(row["bytes_per_frame"] / 1000, ".0f"))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if found := _of_kind(rows, "ratio"):
        lines += [
            "",
            "| frames | clips/s of | workers | times (20 % – 80 %) | target | by CPU time |",
        ]
        lines.append("|---" * 6 + "|")
        for row in found:
            cells = [row["case"], row["provider"], row["threads"], _spread(row, ".2f")]
            cells.append(f"≥ {row['target']}" if "target" in row else "")
            cells.append(format(row["cpu_ratio"], ".2f"))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    if found := _of_kind(rows, "wait"):
        lines += ["", "| training on | loader | workers | share of the time spent waiting |"]
        lines.append("|---" * 4 + "|")
        for row in found:
            where = f"{row['case']} | {row['provider']} | {row['threads']}"
            lines.append(f"| {where} | {row['median']:.0%} |")
    failed = [
        f"* {row['case']} {row['provider']} on {row['device']}, {row['threads']} workers: "
        f"{row['error']}"
        for row in rows
        if "error" in row
    ]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.get("kind") == kind]


def _spread(row: Row, form: str) -> str:
    return f"{row['median']:{form}} ({row['p20']:{form}} – {row['p80']:{form}})"


def draw_data(rows: Sequence[Row], path: Path) -> None:
    """Bars of clips a second, a panel for each number of workers."""
    pyplot = _pyplot()
    shown = _of_kind(rows, "rate")
    if pyplot is None or not shown:
        return
    numbers = list(dict.fromkeys(row["threads"] for row in shown))
    figure, panels = pyplot.subplots(
        len(numbers), 1, figsize=(9, 2.8 * len(numbers)), squeeze=False, layout="constrained"
    )
    kinds = list(dict.fromkeys((row["provider"], row["device"]) for row in shown))
    cases = list(dict.fromkeys(row["case"] for row in shown))
    for panel, number in zip(panels[:, 0], numbers, strict=True):
        for row in shown:
            if row["threads"] != number:
                continue
            own = [r for r in shown if (r["case"], r["threads"]) == (row["case"], number)]
            place = cases.index(row["case"]) + (own.index(row) - (len(own) - 1) / 2) / 8
            spread = [[row["median"] - row["p20"]], [row["p80"] - row["median"]]]
            colour = f"C{kinds.index((row['provider'], row['device']))}"
            panel.bar(place, row["median"], 0.11, yerr=spread, color=colour)
            label = row["provider"] + (" on GPU" if row["device"] != "cpu" else "")
            panel.annotate(
                f"{label}\n{row['median']:.0f}",
                (place, row["p80"]),
                ha="center",
                va="bottom",
                fontsize=7,
            )
        panel.set_xticks(range(len(cases)), cases)
        panel.margins(y=0.25)
        panel.set_ylabel("clips/s")
        panel.set_title(f"{number} workers", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    """Matplotlib's; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is not installed (pip install matplotlib).")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of every provider's time, a panel an operation."""
    pyplot = _pyplot()
    timed = [row for row in rows if row.get("mode") == "launch" and "median" in row]
    shown = [
        row
        for row in timed
        if row["direction"] == "both"
        or not any(other["op"] == row["op"] and other["direction"] == "both" for other in timed)
    ]
    ops = [op for op in OPERATIONS if any(row["op"] == op for row in shown)]
    if pyplot is None or not ops:
        return
    figure, panels = pyplot.subplots(
        len(ops), 1, figsize=(9, 2.2 * len(ops)), squeeze=False, layout="constrained"
    )
    for panel, op in zip(panels[:, 0], ops, strict=True):
        _panel(panel, op, [row for row in shown if row["op"] == op])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(panel: Any, op: str, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = [name for name in ORDER if any(row["provider"] == name for row in rows)]
    width = 0.8 / len(providers)
    for place, provider in enumerate(providers):
        own = {row["case"]: row for row in rows if row["provider"] == provider}
        where = [k + place * width for k, case in enumerate(cases) if case in own]
        found = [own[case] for case in cases if case in own]
        heights = [row["median"] for row in found]
        spread = [
            [max(0.0, row["median"] - row["p20"]) for row in found],
            [max(0.0, row["p80"] - row["median"]) for row in found],
        ]
        colour = f"C{ORDER.index(provider)}"
        panel.bar(where, heights, width, yerr=spread, label=provider, color=colour)
    direction = "forward + backward" if rows[0]["direction"] == "both" else "forward"
    panel.set_title(f"{op}, {direction}", fontsize=10)
    panel.set_xticks([k + 0.4 - width / 2 for k in range(len(cases))], cases)
    panel.set_yscale("log")
    panel.set_ylabel("ms")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
