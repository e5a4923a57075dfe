"""Does it learn? Masks on held-out videos: trivial baselines, untrained, warm start, trained.

`report RUN` scores one finished run of the preset `tiny` and draws its picture (`make train`);
`table` trains and scores it for several seeds (`make learning-table`).
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from smtc import presets
from smtc.benchmarks.tables import learning_table
from smtc.config import Config, from_dict
from smtc.errors import UserError
from smtc.evaluation.baselines import baseline_rows, feature_row
from smtc.evaluation.datasets import EvaluationVideo, open_dataset
from smtc.evaluation.discovery import Row, model_row, sample_maps, write_json
from smtc.evaluation.manifest import commit, versions
from smtc.model import SMTC
from smtc.pipelines.synthetic import synthesize
from smtc.training.telemetry import read_metrics
from smtc.training.trainer import train
from smtc.visualize import training_report
from smtc.weights import load_init, load_model

LOSSES = ("loss", "alignment", "regularisation", "instance")
HELD_OUT = Path("data/synthetic/val")
HELD_OUT_VIDEOS, HELD_OUT_SEED = 30, 2000


def report(run: tyro.conf.Positional[Path], held_out: Path = HELD_OUT) -> list[Row]:
    """Score a run of the preset `tiny` on held-out videos and draw what it sees.

    Args:
        run: the run folder; `evaluation.json` and `report.png` are written into it.
        held_out: a synthetic set that the run was not trained on.
    """
    videos = open_dataset("synthetic", held_out)
    trained = load_model(run)
    rows = [*baseline_rows(videos), *_model_rows(_read_config(run), trained, videos)]
    write_json(run / "evaluation.json", {"commit": commit(), "versions": versions(), "rows": rows})
    metrics = read_metrics(run / "metrics.jsonl")
    losses = {name: [(line["step"], line[name]) for line in metrics] for name in LOSSES}
    training_report(run / "report.png", sample_maps(trained, videos), losses)
    print(learning_table({name: [row] for name, row in _by_name(rows).items()}).markdown())
    for file in ("report.png", "evaluation.json", "model", "metrics.jsonl", "tensorboard"):
        print(f"  {run / file}")
    return rows


def _read_config(run: Path) -> Config:
    file = run / "config.json"
    try:
        return from_dict(Config, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not the settings of a run ({error}); give a run folder."
        ) from error


def _model_rows(config: Config, trained: SMTC, videos: Sequence[EvaluationVideo]) -> list[Row]:
    """The rows of the network: as it was made, on the warm-started encoder alone, and trained."""
    torch.manual_seed(config.train.seed)
    untrained = SMTC(config.model).eval()
    rows = [
        model_row(untrained, videos, "untrained"),
        feature_row(untrained, videos, "k-means on untrained features, k = 4"),
    ]
    if config.init is not None:
        load_init(untrained, config.init)
        rows.append(model_row(untrained, videos, "warm start, untrained slots"))
        rows.append(feature_row(untrained, videos, "warm start + k-means"))
    return [*rows, model_row(trained, videos, "trained")]


def table(
    seeds: tuple[int, ...] = (0, 1, 2),
    output: Path = Path("runs/learning"),
    difficulty: str = "standard",
) -> None:
    """Warm-start, train and score the preset `tiny` for each seed; print the README's table.

    Args:
        seeds: of the training runs; the videos are the same for all.
        output: gets a folder a seed and `learning.json`.
        difficulty: of the synthetic videos.
    """
    folder = Path("data/synthetic")
    if difficulty != "standard":
        folder = folder / difficulty
    synthesize(folder / "train", difficulty=difficulty)
    synthesize(folder / "val", videos=HELD_OUT_VIDEOS, seed=HELD_OUT_SEED, difficulty=difficulty)
    by_name: dict[str, list[Row]] = {}
    for seed in seeds:
        run = _train_both(seed, output / f"seed_{seed}", folder / "train")
        for name, row in _by_name(report(run, folder / "val")).items():
            by_name.setdefault(name, []).append(row)
    results = {"commit": commit(), "versions": versions(), "seeds": list(seeds), "rows": by_name}
    write_json(output / "learning.json", results)
    print(learning_table(by_name).markdown())


def _train_both(seed: int, folder: Path, data: Path) -> Path:
    """The warm start, then SMTC on it; returns SMTC's run folder."""
    encoder, run = folder / "tiny_encoder", folder / "tiny"
    for preset, output, init in (
        (presets.tiny_encoder(), encoder, None),
        (presets.tiny(), run, encoder),
    ):
        config = dataclasses.replace(
            preset,
            output=str(output),
            init=None if init is None else str(init),
            train=dataclasses.replace(preset.train, seed=seed),
            data=dataclasses.replace(preset.data, root=str(data)),
        )
        train(config)
    return run


def _by_name(rows: list[Row]) -> dict[str, Row]:
    return {row["model"]: row for row in rows}


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"report": report, "table": table})
    except UserError as error:
        print(f"smtc: {error}", file=sys.stderr)
        sys.exit(2)
