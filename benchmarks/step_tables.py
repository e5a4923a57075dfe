"""The rows of step, memory, quality, scaling and profile as tables and charts.

Rows may lack columns, as those of a benchmark of another version do: the cell is then empty.
"""

from collections.abc import Sequence
from functools import partial

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
    milliseconds,
    number,
    of_kind,
    settings,
    spread,
    text,
)

ON_GPU = ("triton", "triton+compile", "triton+graphs")
"""Providers of a step that a CPU cannot run."""
SIZES = ("L", "B", "T", "N")
"""Positions, clips, frames and slots of a step."""
NO_SCORES = ("seed", "steps", "kind", "repeats", "threads", "n", "seconds")
"""Numbers of a run that are none of its scores."""


def step_blocks(rows: Sequence[Row]) -> list[Block]:
    """A row a case and provider, phases, what each ablated change is worth, and bars."""
    measured = of_kind(rows, "provider")
    charts: list[Block] = []
    for case in dict.fromkeys(text(row.get("case")) for row in measured):
        own = [row for row in measured if text(row.get("case")) == case]
        bars = [_clips_bar(row) for row in own if is_number(row.get("clips_per_s"))]
        charts.append(Chart(f"{case}, clips/s", bars))
    return [
        *settings(rows),
        *providers_tables(rows),
        *phase_tables(rows),
        *ablation_tables(rows),
        *failures(rows, ("kind", "case", "provider", "change", "phase")),
        *charts,
        *_phase_charts(of_kind(rows, "phase")),
    ]


def providers_tables(rows: Sequence[Row]) -> list[Table]:
    """Time, speed and memory of whole steps; what needs a GPU is listed before it was measured."""
    shown = of_kind(rows, "provider")
    for case in dict.fromkeys(row.get("case") for row in shown):
        present = [row.get("provider") for row in rows if row.get("case") == case]
        shown += [
            {"case": case, "provider": name, "device": "cuda", "missing": True}
            for name in ON_GPU
            if name not in present
        ]
    columns: Columns = {
        "case": "case",
        "provider": "provider",
        "device": "device",
        "ms a step (20 % – 80 %)": lambda row: UNMEASURED if "missing" in row else _step_time(row),
        "clips/s": lambda row: number(row.get("clips_per_s")),
        "times plain": lambda row: number(row.get("speedup"), ".2f"),
        "peak MB beyond what is held": lambda row: number(row.get("peak_mb"), ".0f"),
        "GFLOP": lambda row: number(row.get("flops"), ",.0f", 1e-9),
        "of peak FLOP": lambda row: number(row.get("utilisation"), ".0%"),
        "host syncs": "syncs",
        "threads": "threads",
    }
    return listed(shown, columns)


def _step_time(row: Row) -> str:
    return spread(row, ".0f" if is_number(row.get("median")) and row["median"] >= 100 else ".3g")


def _clips_bar(row: Row) -> Bar:
    """Clips a second; its range is that of the time."""
    rate, median = row["clips_per_s"], known(row, "median")
    slow, fast = known(row, "p80"), known(row, "p20")
    low = rate * median / slow if median and slow else None
    high = rate * median / fast if median and fast else None
    return Bar(text(row.get("provider")), rate, number(rate), low, high, _colour(row))


def _colour(row: Row) -> str:
    provider = text(row.get("provider"))
    if provider.startswith("triton"):
        return OWN
    return EAGER if provider.startswith(("eager", "compile")) else OTHER


def phase_tables(rows: Sequence[Row]) -> list[Table]:
    """Where a step's time goes, a column a case and provider."""
    shares = _shares(of_kind(rows, "phase"))
    phases = dict.fromkeys(phase for own in shares.values() for phase in own)
    lines = []
    for phase in phases:
        cells = [own.get(phase) for own in shares.values()]
        lines.append([phase, *(f"{milliseconds(c[0])} ({c[1]:.0%})" if c else "" for c in cells)])
    heads = ["phase", *(f"{case} {provider}, ms" for case, provider in shares)]
    return [Table(heads, lines)] if lines else []


def _shares(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """By case and provider, then by phase: milliseconds, and their share of all phases."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if is_number(row.get("median")):
            key = text(row.get("case")), text(row.get("provider"))
            found.setdefault(key, {})[text(row.get("phase"))] = row["median"]
    return {
        key: {phase: (ms, ms / (sum(own.values()) or 1)) for phase, ms in own.items()}
        for key, own in found.items()
    }


def _phase_charts(rows: Sequence[Row]) -> list[Block]:
    charts: list[Block] = []
    for (case, provider), own in _shares(rows).items():
        colour = _colour({"provider": provider})
        bars = [
            Bar(phase, ms, f"{milliseconds(ms)} ({share:.0%})", colour=colour)
            for phase, (ms, share) in own.items()
        ]
        charts.append(Chart(f"{case} {provider}: phases of a step, ms", bars))
    return charts


def ablation_tables(rows: Sequence[Row]) -> list[Table]:
    """What one change alone is worth."""
    columns: Columns = {
        "case": "case",
        "provider": "provider",
        "change": "change",
        "ms a step (20 % – 80 %)": _step_time,
        "worth": lambda row: number(row.get("worth"), ".2f") + "x" * is_number(row.get("worth")),
    }
    return listed(of_kind(rows, "ablation"), columns)


def memory_blocks(rows: Sequence[Row]) -> list[Block]:
    """The laws and what fits, every peak, and bars."""
    peaks = of_kind(rows, "peak")
    columns: Columns = {
        "provider": "provider",
        **{size: size for size in SIZES},
        "MB held": lambda row: number(row.get("held_mb"), ",.0f"),
        "peak MB beyond": lambda row: number(row.get("peak_mb"), ",.0f"),
    }
    charts: list[Block] = []
    for provider in dict.fromkeys(text(row.get("provider")) for row in peaks):
        bars = [
            Bar(_sizes(row), row["peak_mb"], f"{row['peak_mb']:,.0f}", colour=_colour(row))
            for row in peaks
            if text(row.get("provider")) == provider and is_number(row.get("peak_mb"))
        ]
        charts.append(Chart(f"{provider}: peak MB of a step", bars))
    return [
        *settings(rows),
        *memory_summary(rows),
        *listed(peaks, columns),
        *failures(rows, ("kind", "provider", *SIZES)),
        *charts,
    ]


def memory_summary(rows: Sequence[Row]) -> list[Block]:
    """The laws fitted to the peaks, and the largest step that fits."""
    return [*law_tables(rows), *_limit_tables(of_kind(rows, "limit"))]


def _limit_tables(rows: Sequence[Row]) -> list[Table]:
    """The most clips, a column a number of positions, within each memory."""
    memories = sorted({row["memory_mb"] for row in rows if is_number(row.get("memory_mb"))})
    positions = list(dict.fromkeys(text(row.get("L")) for row in rows))

    def cell(own: Sequence[Row], length: str) -> str:
        clips = {row.get("memory_mb"): row.get("B") for row in own if text(row.get("L")) == length}
        return " / ".join(text(clips.get(memory)) for memory in memories)

    lines = []
    for provider in dict.fromkeys(text(row.get("provider")) for row in rows):
        own = [row for row in rows if text(row.get("provider")) == provider]
        found = dict.fromkeys(_found(row) for row in own)
        lines.append([provider, *(cell(own, length) for length in positions), ", ".join(found)])
    within = " / ".join(number(memory, ".0f", 1e-3) for memory in memories)
    heads = [f"most clips within {within} GB", *(f"L = {length}" for length in positions), "found"]
    return [Table(heads, lines)] if lines else []


def _found(row: Row) -> str:
    if row.get("by") != "law":
        return text(row.get("by"))
    return f"extrapolated by the law of this {'GPU' if row.get('law_of') == 'cuda' else 'CPU'}"


def law_tables(rows: Sequence[Row]) -> list[Table]:
    """The laws fitted to the peaks."""

    def coefficients(row: Row) -> str:
        found = row.get("coefficients")
        pairs = found.items() if isinstance(found, dict) else ()
        return ", ".join(f"{name} {number(value, '.4g') or value}" for name, value in pairs)

    columns: Columns = {
        "provider": "provider",
        "MB is about": "law",
        "coefficients": coefficients,
        "worst error": lambda row: number(row.get("worst_error"), ".0%"),
    }
    return listed(of_kind(rows, "law"), columns)


def _sizes(row: Row) -> str:
    return ", ".join(f"{name} = {row[name]}" for name in SIZES if row.get(name) is not None)


def quality_blocks(rows: Sequence[Row]) -> list[Block]:
    """Scores by provider over the seeds, paired differences, every run, and bars."""
    runs = of_kind(rows, "run")
    columns: Columns = {
        "provider": "provider",
        "seed": "seed",
        **{score: partial(_score, score) for score in _scores(runs)},
    }
    charts: list[Block] = []
    for score in _scores(runs)[:3]:
        bars = []
        for provider, values in _by_provider(runs, score).items():
            mean = sum(values) / len(values)
            colour = _colour({"provider": provider})
            bars.append(Bar(provider, mean, f"{mean:.3f}", min(values), max(values), colour))
        charts.append(Chart(f"{score}, mean and range of the seeds", bars))
    return [
        *settings(rows),
        *quality_tables(rows),
        *listed(runs, columns),
        *failures(rows, ("kind", "provider", "seed", "metric")),
        *charts,
    ]


def quality_tables(rows: Sequence[Row]) -> list[Table]:
    """Means and ranges by provider, then paired differences with their intervals."""
    runs = of_kind(rows, "run")
    scores = _scores(runs)
    lines = []
    for provider in dict.fromkeys(text(row.get("provider")) for row in runs):
        seeds = sum(text(row.get("provider")) == provider for row in runs)
        values = [_by_provider(runs, score).get(provider, []) for score in scores]
        lines.append([provider, str(seeds), *map(_mean_and_range, values)])
    differences: Columns = {
        "metric": "metric",
        "a": "a",
        "b": "b",
        "mean difference": lambda row: number(row.get("mean"), "+.3f"),
        "interval": _interval,
        "seeds": "n",
    }
    table = [Table(["provider", "seeds", *scores], lines)] if lines else []
    return [*table, *listed(of_kind(rows, "difference"), differences)]


def _mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def _interval(row: Row) -> str:
    low, high = (number(row.get(key), "+.3f") for key in ("low", "high"))
    return f"{low} … {high}" if low and high else ""


def _score(score: str, row: Row) -> str:
    return number(row.get(score), ".3f")


def _scores(runs: Sequence[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in runs for key, value in row.items() if is_number(value))
    return [key for key in keys if key not in NO_SCORES]


def _by_provider(runs: Sequence[Row], score: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in runs:
        if is_number(row.get(score)):
            found.setdefault(text(row.get("provider")), []).append(row[score])
    return found


def scaling_blocks(rows: Sequence[Row]) -> list[Block]:
    """Weak and strong scaling by number of processes, and bars."""
    measured = [*of_kind(rows, "weak"), *of_kind(rows, "strong")]
    columns: Columns = {
        "scaling": "kind",
        "processes": "ranks",
        "clips": "clips",
        "backend": "backend",
        "ms a step (20 % – 80 %)": _step_time,
        "clips/s": lambda row: number(row.get("clips_per_s")),
        "efficiency": lambda row: number(row.get("efficiency"), ".0%"),
        "share of communication": lambda row: number(row.get("communication_share"), ".0%"),
        "hidden": lambda row: number(row.get("hidden_share"), ".0%"),
        "threads each": "threads",
        "MB sent a process": lambda row: number(row.get("bytes_per_rank"), ",.1f", 1e-6),
    }
    charts: list[Block] = []
    for kind in dict.fromkeys(text(row.get("kind")) for row in measured):
        bars = [
            Bar(_processes(row), row["clips_per_s"], _speed(row), colour=OWN)
            for row in measured
            if row.get("kind") == kind and is_number(row.get("clips_per_s"))
        ]
        charts.append(Chart(f"{kind} scaling, clips/s", bars))
    sent: Columns = {
        "a step sends while": "phase",
        "processes": "ranks",
        "MB of gradient": lambda row: number(row.get("gradient_mb"), ",.2f"),
        "MB sent a process": lambda row: number(row.get("bytes_per_rank"), ",.2f", 1e-6),
    }
    tables = [*listed(measured, columns), *listed(of_kind(rows, "bytes"), sent)]
    return [*settings(rows), *tables, *failures(rows, ("kind", "ranks", "clips")), *charts]


def _processes(row: Row) -> str:
    return "1 process" if row.get("ranks") == 1 else f"{text(row.get('ranks'))} processes"


def _speed(row: Row) -> str:
    share = number(row.get("efficiency"), ".0%")
    return number(row["clips_per_s"]) + (f" ({share})" if share else "")


def profile_blocks(rows: Sequence[Row]) -> list[Block]:
    """The kernels that take the most time, the device's gaps, and bars."""
    kernels = of_kind(rows, "kernel")
    columns: Columns = {
        "case": "case",
        "provider": "provider",
        "kernel": "name",
        "calls": "calls",
        "total ms": lambda row: milliseconds(row.get("total_ms")),
        "share": lambda row: number(row.get("share"), ".1%"),
    }
    gaps: Columns = {
        "gaps": lambda row: text(row.get("name")) or "between kernels",
        **{name: columns[name] for name in ("case", "provider", "calls")},
        "median": lambda row: f"{number(row.get('median'))} {text(row.get('unit'))}".strip(),
        **{name: columns[name] for name in ("total ms", "share")},
    }
    bars = [
        Bar(_shortened(text(row.get("name"))), row["share"], f"{row['share']:.1%}", colour=OTHER)
        for row in kernels[:15]
        if is_number(row.get("share"))
    ]
    return [
        *settings(rows),
        *listed(kernels, columns),
        *listed(of_kind(rows, "gap"), gaps),
        *failures(rows, ("kind", "case", "provider", "name")),
        *([Chart("share of the time on the device", bars)] if bars else []),
    ]


def _shortened(name: str, letters: int = 24) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
