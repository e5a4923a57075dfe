"""Does speed cost accuracy? The preset `tiny`, trained in fp32 and in the fastest form.

Both forms of a seed start from the same warm start (in fp32), see the same clips and draw the same
numbers, so what is compared is SMTC's own training, and by pairs: an interval of the mean
difference over seeds says more than two means would. The scores are those of held-out synthetic
videos. The seconds of a run are those of its logged steps, with compiling, without interruptions.

A run that was measured under the same settings is not measured again, whatever the commit was:
delete quality.json and quality/ to begin anew. A run that was stopped goes on from its checkpoint.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from smtc import presets
from smtc.benchmarks.blocks import Row, is_number, markdown
from smtc.benchmarks.harness import Report, commit, pick_device, read_report
from smtc.benchmarks.learning import HELD_OUT_SEED, HELD_OUT_VIDEOS
from smtc.benchmarks.step_providers import PROVIDERS, changed, fastest
from smtc.benchmarks.step_tables import quality_blocks
from smtc.config import Config
from smtc.errors import UserError
from smtc.evaluation.datasets import EvaluationVideo, open_dataset
from smtc.evaluation.discovery import model_row
from smtc.pipelines.synthetic import synthesize
from smtc.progress import track
from smtc.training.telemetry import read_metrics
from smtc.training.trainer import train
from smtc.weights import load_model

METRICS = ("ari", "fg_iou", "miou", "fg_ari")
REFERENCE = "eager-fp32"
CONFIDENCE = 0.95
DATA = Path("data/synthetic")
STEPS, WARM_STEPS = presets.tiny().train.steps, presets.tiny_encoder().train.steps


def run(
    output: Path,
    *,
    seeds: int = 5,
    steps: int = STEPS,
    warm_steps: int = WARM_STEPS,
    data: Path = DATA,
    device: str = "auto",
) -> int:
    """Train, score, print tables and write `output`/quality.json.

    Args:
        output: the folder; gets the runs too, under `quality`.
        seeds: so many, from 0; an interval needs two.
        steps: of SMTC.
        warm_steps: of the encoder's warm start.
        data: has the videos in `train` and `val`, which are written where they are missing.
        device: "cuda", "cpu" or "auto".

    Returns:
        the exit code 0.
    """
    device = pick_device(device)
    if min(seeds, steps, warm_steps) < 1:
        raise UserError("--seeds, --steps and --warm-steps are numbers of at least 1.")
    if not (data / "train").exists():
        synthesize(data / "train")
    if not (data / "val").exists():
        synthesize(data / "val", videos=HELD_OUT_VIDEOS, seed=HELD_OUT_SEED)
    held_out = open_dataset("synthetic", data / "val")
    bench = _Bench(output, device, steps, warm_steps, data)
    jobs = [(seed, provider) for seed in range(seeds) for provider in bench.forms]
    for seed, provider in track(jobs, title=f"quality on {device}", unit="run"):
        bench.measure(seed, provider, held_out)
    bench.conclude(seeds)
    print(markdown(quality_blocks(bench.report.rows)))
    print(f"{len(bench.report.rows)} rows in {bench.report.path}")
    return 0


class _Bench:
    """Trains and scores into a report that may hold rows already."""

    def __init__(self, output: Path, device: str, steps: int, warm_steps: int, data: Path) -> None:
        self.forms = (fastest(device), REFERENCE)
        self.device, self.data = device, data
        self.steps, self.warm_steps = steps, warm_steps
        self.folder = output / "quality" / f"{device}, {steps} steps after {warm_steps}"
        settings: Row = {
            "kind": "settings",
            "preset": "tiny",
            "steps": steps,
            "warm start": f"{warm_steps} steps in fp32, shared by both",
            "device": device,
            "scored in": "fp32 on the CPU",
            "data": str(data),
        }
        kept = kept_runs(output / "quality.json", settings)
        self.report = Report(output / "quality.json")
        for row in (settings, *kept):
            self.report.add(row)

    def measure(self, seed: int, provider: str, held_out: Sequence[EvaluationVideo]) -> None:
        """A row of one run's scores, unless there is one."""
        same = {"kind": "run", "provider": provider, "seed": seed}
        if any(same.items() <= row.items() for row in self.report.rows):
            return
        config = self._config(seed, provider)
        _train(config)
        assert config.output is not None
        found = model_row(load_model(config.output), held_out, str(provider))
        scores = {metric: round(found[metric], 5) for metric in METRICS}
        # The report's own commit is that of its newest rows.
        self.report.add(same | scores | {"seconds": round(seconds(config), 3), "commit": commit()})

    def _config(self, seed: int, provider: str) -> Config:
        """Of SMTC on the seed's warm start, which is trained first where it is not."""
        folder = self.folder / f"seed {seed}"
        same = {
            "data.root": str(self.data / "train"),
            "train.seed": seed,
            "train.device": self.device,
        }
        encoder = str(folder / "warm start")
        own = {"output": encoder, "train.steps": self.warm_steps}
        warm = changed(presets.tiny_encoder(), same | own)
        if not (folder / "warm start" / "model").exists():
            _train(warm)
        own = {"output": str(folder / provider), "init": encoder, "train.steps": self.steps}
        return changed(presets.tiny(), same | own | dict(PROVIDERS[provider].settings))

    def conclude(self, seeds: int) -> None:
        """A row a metric of the fastest form's scores less the reference's."""
        first, second = self.forms
        labels = {"kind": "difference", "a": first, "b": second}
        for metric in METRICS:
            a, b = (self._scores(name, metric, seeds) for name in self.forms)
            differences = [one - other for one, other in zip(a, b, strict=True)]
            found = {key: round(value, 5) for key, value in interval(differences).items()}
            self.report.add(labels | {"metric": metric} | found | {"n": len(differences)})

    def _scores(self, provider: str, metric: str, seeds: int) -> list[float]:
        own = {
            row["seed"]: row[metric]
            for row in self.report.rows
            if row["kind"] == "run" and row["provider"] == provider
        }
        return [own[seed] for seed in range(seeds)]


def _train(config: Config) -> None:
    # A process compiles a function for only so many models before it gives up.
    torch.compiler.reset()
    train(config)


def kept_runs(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    """The runs that an earlier report of the same settings holds."""
    rows = read_report(path)["rows"] if path.exists() else []
    if dict(settings) not in rows:
        return []
    whole = ("seed", *METRICS)
    return [
        row
        for row in rows
        if row.get("kind") == "run" and all(is_number(row.get(key)) for key in whole)
    ]


def seconds(config: Config) -> float:
    """How long a run's logged steps took, its interruptions left out."""
    lines = read_metrics(Path(str(config.output)) / "metrics.jsonl")
    clips, taken, before = config.train.batch * config.train.accumulate, 0.0, 0
    for line in lines:
        taken += (line["step"] - before) * clips / line["clips_per_s"]
        before = line["step"]
    return taken


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, float]:
    """The mean with its confidence interval by Student's t; NaN where one value says nothing."""
    count = len(differences)
    mean = statistics.fmean(differences)
    if count < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    error = statistics.stdev(differences) / math.sqrt(count)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}
