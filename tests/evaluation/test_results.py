"""What an evaluation refuses, and what its results say of several methods and seeds."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from PIL import Image
from written_datasets import WRITERS

from smtc import cli_evaluate
from smtc.errors import UserError
from smtc.evaluation.datasets import DATASETS, open_dataset
from smtc.evaluation.discovery import Evaluation, evaluate
from smtc.evaluation.methods import Inference, Method, lone_baselines, model_methods
from smtc.evaluation.protocols import PROTOCOLS
from smtc.evaluation.results import Run, build_results, results_table, write_csv, write_json
from smtc.weights import load_model


@pytest.fixture
def evaluation(synthetic_data: Path, tiny_run: Path, tmp_path: Path) -> Evaluation:
    """Six videos, scored by a model, k-means (two seeds each) and a box."""
    return Evaluation(
        methods=model_methods(load_model(tiny_run), ["backbone", "centre-box"], Inference(), {}),
        dataset="synthetic",
        root=synthetic_data,
        output=tmp_path / "out",
        seeds=(0, 1),
    )


@pytest.fixture
def three_runs(synthetic_data: Path) -> dict[str, Any]:
    """Two videos of eight frames: a method with two seeds, and one that draws nothing."""
    videos = open_dataset("davis2016", synthetic_data)[:2]

    def scores(*values: float) -> list[dict[str, Any]]:
        return [{"j": np.full(8, value), "f": np.full(8, math.nan)} for value in values]

    runs = [
        Run("drawn", 4, scores(0.1, 0.3)),
        Run("drawn", 9, scores(0.5, 0.9)),
        Run("fixed", None, scores(0.25, 0.75)),
    ]
    return build_results("davis2016", PROTOCOLS["davis2016"], videos, runs)


def test_mean_and_spread_by_hand(three_runs: dict[str, Any]) -> None:
    drawn, fixed = three_runs["methods"]["drawn"], three_runs["methods"]["fixed"]
    assert [run["seed"] for run in drawn["runs"]] == drawn["seeds"] == [4, 9]
    assert [run["j_frames"] for run in drawn["runs"]] == pytest.approx([0.2, 0.7])
    assert drawn["mean"]["j_frames"] == pytest.approx(0.45)
    assert drawn["std"]["j_frames"] == pytest.approx(0.5 / math.sqrt(2))
    assert math.isnan(drawn["mean"]["f_frames"]) and math.isnan(drawn["std"]["f_frames"])
    assert fixed["seeds"] is None and fixed["std"] is None
    assert fixed["mean"]["j_sequences"] == 0.5
    assert three_runs["method"] == "drawn" and three_runs["j_frames"] == drawn["mean"]["j_frames"]
    assert three_runs["videos"] == 2 and three_runs["frames"] == 16
    rows = [(row["method"], row["seed"], row["video"]) for row in three_runs["per_video"]]
    names = ("00000", "00001")
    assert rows == [
        (*run, n) for run in (("drawn", 4), ("drawn", 9), ("fixed", None)) for n in names
    ]
    assert [row["j_frames"] for row in three_runs["per_video"]] == [0.1, 0.3, 0.5, 0.9, 0.25, 0.75]


def test_seeds_without_a_score_are_left_out(synthetic_data: Path) -> None:
    videos = open_dataset("davis2016", synthetic_data)[:1]
    values = (0.2, math.nan, 0.6)
    runs = [Run("drawn", seed, [{"j": np.full(8, value)}]) for seed, value in enumerate(values)]
    entry = build_results("davis2016", PROTOCOLS["davis2016"], videos, runs)["methods"]["drawn"]
    assert entry["mean"]["j_frames"] == pytest.approx(0.4)
    assert entry["std"]["j_frames"] == pytest.approx(0.4 / math.sqrt(2))
    assert math.isnan(entry["runs"][1]["j_frames"]) and entry["seeds"] == [0, 1, 2]


def test_the_table(three_runs: dict[str, Any], tmp_path: Path) -> None:
    three_runs["methods"]["fixed"]["mean"]["j_sequences"] = -0.0001
    lines = results_table(write_json(tmp_path / "results.json", three_runs)).splitlines()
    assert lines == [
        "                     drawn          fixed",
        "                   2 seeds  nothing drawn",
        "j_frames     0.450 ± 0.354          0.500",
        "f_frames                 -              -",
        "j_sequences  0.450 ± 0.354          0.000",
        "f_sequences              -              -",
    ]
    for entry in three_runs["methods"].values():
        entry["std"], entry["seeds"] = None, entry["seeds"] and [4]
    one = results_table(write_json(tmp_path / "results.json", three_runs)).splitlines()
    assert one[1].split() == ["seed", "4", "nothing", "drawn"]
    assert one[2].split() == ["j_frames", "0.450", "0.500"]


def test_rows_as_csv(three_runs: dict[str, Any], tmp_path: Path) -> None:
    kept = write_json(tmp_path / "results.json", three_runs)
    write_csv(tmp_path / "results.csv", kept["per_video"])
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["4", "4", "9", "9", "", ""]
    assert rows[0]["f_frames"] == "" and float(rows[3]["j_frames"]) == 0.9


# What an evaluation refuses.


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": ()}, "--seeds are whole numbers from 0"),
        ({"seeds": (0, -1)}, "--seeds are whole numbers from 0"),
        ({"seeds": (0, 1, 0)}, "--seeds holds a number twice"),
        ({"penguin": True}, "--penguin is a switch of segtrackv2, not of synthetic"),
    ],
)
def test_impossible_evaluations(evaluation: Evaluation, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        dataclasses.replace(evaluation, **changes)


def test_mistakes_of_the_command_line(
    safe: Command, synthetic_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "discovery", "--data", synthetic_data, "--output", tmp_path / "out"]
    command += ["--device", "cpu"]
    weights = ["--checkpoint", tiny_run]
    assert "twice" in safe(*command, *weights, "--seeds", 1, 1)
    assert "from 0" in safe(*command, *weights, "--seeds", -1)
    told = "There is no baseline 'whole-fram'; did you mean 'whole-frame'?"
    assert told in safe(*command, "--baselines", "whole-fram")
    assert "The baseline backbone needs a model" in safe(*command, "--baselines", "all")
    assert "There is no file" in safe(*command, "--backbone", tmp_path / "absent.pth")
    assert "only one of" in safe(*command, *weights, "--backbone", tiny_run)
    assert "clusters is 1" in safe(*command, *weights, "--clusters", 1)
    for source in (weights, ["--backbone", tiny_run]):
        assert "multiple" in safe(*command, *source, "--resolution", 33, 40)


# What the results say.


def test_a_method_without_a_draw_is_scored_once(evaluation: Evaluation) -> None:
    results = evaluate(evaluation)
    methods = results["methods"]
    assert list(methods) == ["model", "backbone alone", "centre box"]
    assert results["method"] == "model"
    assert [entry["seeds"] for entry in methods.values()] == [[0, 1], [0, 1], None]
    assert methods["centre box"]["std"] is None
    runs = methods["backbone alone"]["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    both = [run["ari"] for run in runs]
    assert methods["backbone alone"]["mean"]["ari"] == pytest.approx(sum(both) / 2)
    assert methods["backbone alone"]["std"]["ari"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)
    assert results["ari"] == methods["model"]["mean"]["ari"]
    rows = [(row["method"], row["seed"], row["video"]) for row in results["per_video"]]
    names = [f"{index:05}" for index in range(6)]
    drawn = [("model", 0), ("model", 1), ("backbone alone", 0), ("backbone alone", 1)]
    assert rows == [(*run, name) for run in [*drawn, ("centre box", None)] for name in names]
    manifest = json.loads((evaluation.output / "manifest.json").read_text())
    assert [method["seeds"] for method in manifest["methods"]] == [[0, 1], [0, 1], None]
    assert manifest["methods"][2]["switches"]["box"] == "the central 0.5 of height and width"


def test_baselines_alone_and_what_is_told(
    cli: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "discovery", "--data", synthetic_data, "--dataset", "davis2016"]
    command += ["--baselines", "centre-box", "whole-frame", "--output", tmp_path / "out"]
    told = cli(*command)
    assert told.code == 0
    lines = told.out.splitlines()
    assert lines[0].split() == ["whole", "frame", "centre", "box"]
    assert lines[1].split() == ["nothing", "drawn", "nothing", "drawn"]
    shown = dict((line.split()[0], line.split()[1:]) for line in lines[2:-1])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for column, entry in enumerate(results["methods"].values()):
        assert len(entry["mean"]) == len(shown) == 12
        for score, mean in entry["mean"].items():
            assert shown[score][column] == f"{mean:.3f}"
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned
    assert "±" not in told.out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["checkpoint"] is None and manifest["weights_sha256"] is None


def test_the_flags_reach_the_methods(tiny_run: Path) -> None:
    def made(**flags: Any) -> list[Method]:
        given = cli_evaluate._Discovery(data=Path("data"), output=Path("out"), **flags)
        return cli_evaluate._methods(given, torch.device("cpu"))

    settings = {"resolution": (48, 64), "precision": "bf16", "clusters": 3}
    for method in made(checkpoint=tiny_run, baselines=("backbone",), **settings):
        assert method.switches["size"] == [48, 64] and method.switches["precision"] == "bf16"
        assert method.switches.get("clusters", 3) == 3
        assert method.weights is not None and method.weights["path"] == str(tiny_run)
    alone = made(backbone=str(tiny_run), baselines=("random",))
    assert [method.name for method in alone] == ["backbone alone", "random weights"]
    assert alone[0].switches["size"] == [256, 256] and alone[0].switches["clusters"] == 4
    for method in made(untrained="tiny", baselines=("backbone",), preset="official"):
        assert method.switches["size"] == [480, 800] and method.switches["mean"][0] == 0.43216
    assert [method.name for method in made(baselines=("whole-frame",))] == ["whole frame"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_and_method(
    cli: Command, tiny_run: Path, tmp_path: Path, dataset: str
) -> None:
    data = WRITERS[dataset](tmp_path / "data")
    command = ["evaluate", "discovery", "--dataset", dataset, "--data", data]
    command += ["--checkpoint", tiny_run, "--baselines", "all", "--device", "cpu"]
    told = cli(*command, "--output", tmp_path / "out")
    assert told.code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["model", "backbone alone", "random weights", "whole frame", "centre box"]
    assert list(results["methods"]) == names and results["dataset"] == dataset
    videos = open_dataset(dataset, data)
    assert len(results["per_video"]) == 5 * len(videos)
    assert results["frames"] == sum(len(video.annotated) for video in videos)
    scores = results["methods"]["centre box"]["mean"]
    assert scores.keys() <= results.keys() and len(scores) > 3
    assert all(line.split()[0] in scores for line in told.out.splitlines()[2:-1])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["protocol"] == f"discovery {dataset}"
    assert manifest["switches"].get("penguin") == (False if dataset == "segtrackv2" else None)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size[1] > 100 * min(6, len(videos))


def test_lone_baselines_need_no_torch_model(synthetic_data: Path, tmp_path: Path) -> None:
    methods = lone_baselines(["whole-frame"])
    given = {"methods": methods, "dataset": "davis2016", "root": synthetic_data}
    results = evaluate(Evaluation(**given, output=tmp_path / "out", seeds=(5, 6)))
    assert results["best_slot_j_frames"] == results["j_frames"] > 0
    assert results["methods"]["whole frame"]["seeds"] is None
