"""From scores to result files: means and spreads over seeds, rows, JSON, CSV, a table to read."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smtc.evaluation.protocols import FrameScores, Protocol
from smtc.evaluation.videos import EvaluationVideo

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A method's scores of every video of a data set."""

    method: str
    seed: int | None
    """None where nothing of the method is drawn."""
    scores: Sequence[FrameScores]


def build_results(
    dataset: str, protocol: Protocol, videos: Sequence[EvaluationVideo], runs: Sequence[Run]
) -> dict[str, Any]:
    """What `results.json` holds.

    The means of the first method stand at the top level, then `methods` by name: `seeds` (null
    where nothing is drawn), `runs` (the means of each seed), their `mean` and `std` (the sample's
    standard deviation, null for a single run); `per_video` has a row a method, seed and video.
    """
    methods: dict[str, Any] = {}
    for run in runs:
        entry = methods.setdefault(run.method, {"seeds": None, "runs": []})
        entry["runs"].append({"seed": run.seed, **protocol.summarise(run.scores)})
    for entry in methods.values():
        entry["seeds"] = [run["seed"] for run in entry["runs"] if run["seed"] is not None] or None
        names = [name for name in entry["runs"][0] if name != "seed"]
        values = {name: [run[name] for run in entry["runs"]] for name in names}
        entry["mean"] = {name: _mean(found) for name, found in values.items()}
        spreads = {name: _std(found) for name, found in values.items()}
        entry["std"] = spreads if len(entry["runs"]) > 1 else None
    main = runs[0].method
    return {
        "dataset": dataset,
        "videos": len(videos),
        "frames": sum(len(video.annotated) for video in videos),
        "method": main,
        **methods[main]["mean"],
        "methods": methods,
        "per_video": [
            {
                "method": run.method,
                "seed": run.seed,
                "video": video.name,
                "frames": len(video.annotated),
                **protocol.video(found),
            }
            for run in runs
            for video, found in zip(videos, run.scores, strict=True)
        ],
    }


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return statistics.fmean(defined) if defined else math.nan


def _std(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return statistics.stdev(defined) if len(defined) > 1 else math.nan


def write_json(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write `values` as strict JSON, with null for NaN, and return what reading it back gives."""
    kept = _without_nan(values)
    path.write_text(json.dumps(kept, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return kept


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that have the same columns; what is None stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def results_table(results: Mapping[str, Any]) -> str:
    """The methods' means side by side, a line a score, with ± the spread over several seeds."""
    methods = results["methods"]
    rows = [["", *methods], ["", *(_drawn(entry["seeds"]) for entry in methods.values())]]
    for score in next(iter(methods.values()))["mean"]:
        rows.append([score, *(_cell(entry, score) for entry in methods.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _drawn(seeds: Sequence[int] | None) -> str:
    if seeds is None:
        return "nothing drawn"
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _cell(entry: Mapping[str, Any], score: str) -> str:
    mean, spread = entry["mean"][score], (entry["std"] or {}).get(score)
    shown = "-" if mean is None else f"{round(mean, 3) + 0.0:.3f}"  # no minus before zero
    return shown if spread is None else f"{shown} ± {spread:.3f}"
