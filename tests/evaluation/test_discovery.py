"""Scores of whole data sets, with a stand-in model whose masks are known."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from colour_model import GREEN, GREY, RED, ColourModel
from PIL import Image

from smtc.errors import UserError
from smtc.evaluation import baselines, discovery, manifest, metrics, protocols
from smtc.evaluation.datasets import open_dataset
from smtc.inference import segment, segment_frames
from smtc.model import SMTC

KINDS = ("", "border_", "best_slot_")


def boxes(frames=5, size=(64, 96)):
    """Frames of the colour model's world, and their instance ids: red is 1, green is 2."""
    video, ids = np.full((frames, *size, 3), GREY, np.uint8), np.zeros((frames, *size), np.uint8)
    for index in range(frames):
        for label, colour, left in ((1, RED, 4 + 4 * index), (2, GREEN, 56)):
            place = np.s_[index, 16:40, left : left + 24]
            video[place], ids[place] = colour, label
    return video, ids


def seeing(resolution=(64, 96)):
    """A model whose tokens lie within or without an object."""
    return ColourModel(resolution=resolution)


def write_video(root, name, frames, ids):
    for kind, pictures, suffix in (("JPEGImages", frames, "png"), ("Annotations", ids, "png")):
        folder = root / kind / "480p" / name
        folder.mkdir(parents=True)
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{index:05d}.{suffix}")


@pytest.fixture
def world(tmp_path):
    """A data set of two videos that the colour model can solve but for the blur of its grid."""
    root = tmp_path / "data"
    for name, count in (("first", 5), ("second", 3)):
        write_video(root, name, *boxes(count))
    return root


def test_scores_of_a_video_are_those_of_its_frames():
    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, 5, (2, 3, 24, 24))
    true[1] = 0
    found = protocols.score_video(predicted, true, true)
    for name, score in (
        ("ari", metrics.adjusted_rand_index),
        ("fg_iou", metrics.foreground_iou),
        ("miou", metrics.matched_miou),
        ("fg_ari", metrics.fg_ari),
    ):
        wanted = [score(p, t) for p, t in zip(predicted, true, strict=True)]
        assert found[name].tolist() == pytest.approx(wanted, nan_ok=True)
    assert found["instance_ari"].tolist() == [1, 1, 1]
    assert found["instance_miou"][[0, 2]].tolist() == [1, 1]
    assert "instance_ari" not in protocols.score_video(predicted, true)


def test_foreground_by_instances_by_the_border_and_by_the_best_slot():
    true = np.zeros((4, 20, 24), int)
    true[:, 5:15, 5:15], true[:, 5:15, 18:22] = 1, 2
    predicted = true + 3
    predicted[:, 5:15, 20:22] = 6
    instances = np.where(predicted == 4, 9, 0)
    instances[:, 18:] = 5
    found = protocols.score_foreground(instances, predicted, true)
    assert found["j"].tolist() == pytest.approx([100 / 188] * 4)
    assert 0 < found["f"].max() < 1
    assert found["border_j"].tolist() == [1] * 4 and found["border_f"].tolist() == [1] * 4
    assert found["best_slot_j"].tolist() == pytest.approx([100 / 140] * 4)
    assert 0.5 < found["best_slot_f"].min() < 1


def test_the_best_slot_is_one_for_the_video():
    true = np.ones((3, 8, 8), int)
    true[:, :2] = 0
    predicted = np.zeros((3, 8, 8), int)
    predicted[0, 2:] = 1  # perfect once
    predicted[1:, 2:] = 2  # perfect twice
    assert best_j(predicted, true) == [0, 1, 1]
    # Neither the slot that only hits nor the one that covers all is the best.
    predicted = np.where(true > 0, 1, 0)
    predicted[:, 4] = 2
    predicted[:, 1] = 1
    assert best_j(predicted, true) == [40 / 56] * 3
    # A slot that is rightly empty in two frames beats one that is right in the other.
    true, predicted = np.zeros((2, 3, 8, 8), int)
    true[0, :4] = 1
    predicted[0, :2] = 1
    predicted[:, 4:] = 2
    predicted[0, 2:4] = 2
    assert best_j(predicted, true) == [0.5, 1, 1]
    # The same for a label that comes after all others of the frame.
    assert best_j(np.where(predicted == 1, 3, predicted), true) == [0.5, 1, 1]


def best_j(predicted, true):
    return protocols.score_foreground(true, predicted, true)["best_slot_j"].tolist()


def test_the_foreground_of_davis_is_that_of_segment(world):
    # Red is no valid instance, so only green is left, though semantics see both.
    model = ColourModel(scores=((1, 1), (0.4, 0.4), (1, 1)), resolution=(64, 96))
    video = open_dataset("davis2016", world)[0]
    frames, truth = video.load()
    found = protocols.found_in(segment_frames(model, frames), video.annotated)
    scores = protocols.PROTOCOLS["davis2016"].score(found, truth)
    segmented = segment(model, frames).masks > 0
    assert scores["j"].tolist() == metrics.region_similarity(segmented, truth > 0).tolist()
    assert scores["f"].tolist() == metrics.boundary_f(segmented, truth > 0).tolist()
    assert scores["j"].max() < 0.6 < 0.9 < scores["border_j"].min()


def test_averages_pool_frames_and_drop_a_sequences_ends():
    long = {"j": np.array([0, 0.5, 0.7, 0.9, 0.3])}
    short = {"j": np.array([1, 0.1, math.nan, 1])}
    found = protocols.davis_row([long, short])
    assert found["j_frames"] == pytest.approx((2.4 + 2.1) / 8)
    assert found["j_sequences"] == pytest.approx((0.7 + 0.1) / 2)
    assert math.isnan(protocols.davis_row([{"j": np.array([1.0, 1.0])}])["j_sequences"])
    assert protocols.mean_row([long, short]) == pytest.approx({"j": 4.5 / 8})


def test_a_model_that_sees_the_objects_scores_high(world, tmp_path):
    model = seeing()
    results = discovery.evaluate_discovery(model, "synthetic", world, tmp_path / "out")
    assert results["videos"] == 2 and results["frames"] == 8
    for name in ("ari", "fg_iou", "miou", "fg_ari"):
        assert results[name] > 0.9, name
    # The halves split the background, and red when it crosses the middle.
    assert results["instance_ari"] < 0.6
    assert results["instance_miou"] > 0.85
    rows = results["per_video"]
    assert [(row["video"], row["frames"]) for row in rows] == [("first", 5), ("second", 3)]
    assert results["ari"] == pytest.approx((5 * rows[0]["ari"] + 3 * rows[1]["ari"]) / 8)
    # Every frame is scored at its own size, after windows of four.
    assert sum(shape[0] * shape[1] for shape, _ in model.calls) == 8 + 4


def test_the_folder_holds_results_rows_manifest_and_sheet(world, tmp_path):
    out = tmp_path / "out"
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"x")
    results = discovery.evaluate_discovery(
        seeing(), "davis2016", world, out, checkpoint=weights, seeds=(3,), device="cpu"
    )
    names = [".smtc", "manifest.json", "results.csv", "results.json", "sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "results.json").read_text()) == results
    assert results["j_frames"] > 0.9 and results["best_slot_j_sequences"] < 0.6
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == ["first", "second"]
    kinds = [f"{kind}{s}_{a}" for a in ("frames", "sequences") for kind in KINDS for s in "jf"]
    named = ["method", "seed", "video", "frames"]
    assert list(rows[0]) == [*named, *kinds, "j_recall", "j_decay"]
    assert [(row["method"], row["seed"]) for row in rows] == [("model", "3")] * 2
    assert float(rows[0]["j_frames"]) == results["per_video"][0]["j_frames"]
    told = json.loads((out / "manifest.json").read_text())
    assert told["protocol"] == "discovery davis2016"
    assert told["switches"]["size"] == [64, 96] and told["switches"]["iterations"] == 3
    assert "bilinear" in told["switches"]["mask_interpolation"]
    assert told["switches"]["foreground"] == "union of valid instances"
    assert told["data"]["files"] == 16 and told["seeds"] == [3]
    assert told["processes"] == 1 and told["device"] == "cpu"
    assert told["checkpoint"]["sha256"].startswith("2d711642b726b044")  # SHA-256 of "x"
    assert told["versions"]["torch"] == torch.__version__
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size[0] > 800
    # An earlier evaluation gives way to the next.
    discovery.evaluate_discovery(seeing(), "synthetic", world, out)
    assert json.loads((out / "results.json").read_text())["dataset"] == "synthetic"


def test_undefined_scores_are_null(tmp_path):
    frames, ids = boxes(2)
    write_video(tmp_path / "data", "only", frames, (ids == 1).astype(np.uint8))
    found = discovery.evaluate_discovery(seeing(), "synthetic", tmp_path / "data", tmp_path / "out")
    assert found["fg_ari"] is None
    assert "NaN" not in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.parametrize(("protocol", "score"), [("davis2016", "j"), ("synthetic", "miou")])
def test_frames_without_masks_are_seen_but_not_scored(world, protocol, score):
    video = open_dataset("davis2016", world)[0]
    video.annotations[0] = video.annotations[3] = None
    frames, truth = video.load()
    found = protocols.found_in(segment_frames(seeing(), frames), video.annotated)
    scores = protocols.PROTOCOLS[protocol].score(found, truth)
    assert len(scores[score]) == 3 and scores[score].min() > 0.9


def test_samples_show_what_segment_gives(world):
    videos = open_dataset("synthetic", world)
    samples = discovery.sample_maps(seeing(), videos, 5)
    assert [sample.name for sample in samples] == ["first, frame 2", "second, frame 1"]
    frames, ids = boxes(5)
    assert np.array_equal(samples[0].frame, frames[2])
    assert np.array_equal(samples[0].truth, ids[2])
    assert samples[0].background == 0
    assert metrics.foreground_iou(samples[0].instance, ids[2]) > 0.85
    # Red is a semantic, but no object.
    model = ColourModel(scores=((1, 1), (0.4, 0.4), (1, 1)), resolution=(64, 96))
    sample, wanted = discovery.sample_maps(model, videos)[0], segment(model, frames)
    assert np.array_equal(sample.semantic, wanted.semantic[2])
    assert np.array_equal(sample.instance, wanted.masks[2])
    assert sample.semantic.max() == 2 and sample.instance.max() == 1
    assert discovery._spread(30, 4) == [0, 10, 19, 29]
    assert discovery._spread(1, 4) == [0]


def test_a_bad_frame_refuses_the_whole_evaluation(world, tmp_path):
    bad = world / "JPEGImages" / "480p" / "second" / "00001.png"
    bad.write_bytes(bad.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"second/00001\.png: the file is cut short"):
        discovery.evaluate_discovery(seeing(), "synthetic", world, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_an_output_with_other_files_is_refused_before_the_work(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    model = seeing()
    with pytest.raises(UserError, match=r"already holds 'thesis\.tex'"):
        discovery.evaluate_discovery(model, "synthetic", world, tmp_path / "out")
    assert model.calls == []


def test_a_real_model_on_synthetic_videos(synthetic_data, tiny_config, tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = SMTC(tiny_config().model)
    found = discovery.evaluate_discovery(model, "synthetic", synthetic_data, tmp_path / "out")
    row = discovery.model_row(model, open_dataset("synthetic", synthetic_data), "untrained")
    assert row["model"] == "untrained"
    assert row["ari"] == pytest.approx(found["ari"], abs=1e-3)
    assert row["ari"] < 0.3


def test_baselines_solve_what_they_are_made_for(world):
    videos = open_dataset("synthetic", world)
    rows = {row["model"]: row for row in baselines.baseline_rows(videos)}
    assert list(rows) == [
        *(f"colour k-means, k = {k}" for k in (4, 6, 8)),
        *("fixed grid 2x2", "fixed grid 2x4", "fixed grid 3x3", "fixed grid 4x4"),
    ]
    assert rows["colour k-means, k = 4"]["ari"] > 0.7
    assert max(rows[name]["ari"] for name in rows if "grid" in name) < 0.3
    feature = baselines.feature_row(seeing(), videos, "warm start + k-means", clusters=3)
    assert feature["model"] == "warm start + k-means"
    assert feature["ari"] > 0.9


def test_colour_k_means_sees_the_mean_of_a_patch():
    frames = np.full((2, 16, 16, 3), 60, np.uint8)
    frames[:, :, 8:][:, 1::2, 1::2] = 250
    labels = baselines.colour_labels(frames, 2)
    assert labels.shape == (2, 16, 16)
    assert len(set(labels[:, :, :6].flat)) == len(set(labels[:, :, 10:].flat)) == 1
    assert labels[0, 0, 0] != labels[0, 0, 15]


def test_a_grid_has_equal_cells():
    labels = baselines.grid_labels(np.zeros((2, 8, 12, 3), np.uint8), 2, 4)
    assert labels.shape == (2, 8, 12)
    assert np.bincount(labels[0].ravel()).tolist() == [12] * 8
    assert labels[1, 0, ::3].tolist() == [0, 1, 2, 3] and labels[1, 7, 0] == 4


def test_k_means_is_repeatable_and_takes_the_tightest_of_its_runs(monkeypatch):
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [0, 9], [9, 0], [9, 9.0]])
    points = centres[np.arange(80) % 4] + rng.normal(0, 0.2, (80, 2))
    for seed in range(8):
        found, labels = baselines._kmeans(points, 4, seed)
        assert metrics.adjusted_rand_index(labels, np.arange(80) % 4) == 1
        assert np.abs(found[labels] - points).max() < 1
        assert np.array_equal(labels, baselines._kmeans(points, 4, seed)[1])
    runs = iter([(0.5, 0), (0.1, 1), (0.3, 2)])

    def canned(points, clusters, **_):
        shift, label = next(runs)
        return points[:3] + shift, np.full(len(points), label)

    monkeypatch.setattr(baselines, "kmeans2", canned)
    centres, labels = baselines._kmeans(np.zeros((5, 2)), 3, 0)
    assert labels.tolist() == [1] * 5 and centres.tolist() == [[0.1, 0.1]] * 3


def test_k_means_of_fewer_points_than_clusters():
    _, same = baselines._kmeans(np.ones((10, 2)), 4, 0)
    assert len(set(same.tolist())) == 1


def test_hashes_follow_contents_and_not_order(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_text(path.name)
    first = manifest.files_hash(tmp_path, paths)
    assert manifest.files_hash(tmp_path, paths[::-1]) == first
    paths[0].write_text("other")
    assert manifest.files_hash(tmp_path, paths) != first
    with pytest.raises(UserError, match="absent cannot be read"):
        manifest.files_hash(tmp_path, [tmp_path / "absent"])
    model = seeing()
    before = manifest.weights_hash(model)
    assert manifest.weights_hash(seeing((32, 32))) == before
    with torch.no_grad():
        model.colours[0, 0] += 1e-6
    assert manifest.weights_hash(model) != before


def test_the_commit_is_that_of_this_checkout_or_none(tmp_path, monkeypatch):
    found = manifest.commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40
    assert manifest._git(Path(tmp_path / "file"), "describe") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest.commit() is None
    assert manifest.versions()["numpy"] == np.__version__
    monkeypatch.setattr(manifest, "_PACKAGES", ("no-such-package",))
    assert manifest.versions()["no-such-package"] == "not installed"
