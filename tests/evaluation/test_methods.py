"""What is scored beside a model, and that each method sees what its name says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colour_model import GREEN, GREY, RED, ColourModel
from commands import TinyConfig
from PIL import Image
from torch import Tensor

from smtc.config import ModelConfig
from smtc.errors import UserError
from smtc.evaluation import baselines, methods, metrics
from smtc.evaluation.datasets import open_dataset
from smtc.evaluation.methods import BASELINES, Inference, Method
from smtc.evaluation.protocols import found_in
from smtc.evaluation.videos import EvaluationVideo
from smtc.inference import InferenceSettings, segment_frames
from smtc.model import SMTC
from smtc.weights import load_encoder, load_model, save_encoder

CPU = torch.device("cpu")
SIZE = (64, 96)


@pytest.fixture
def video(tmp_path: Path) -> EvaluationVideo:
    """Ten frames: red moves and green stands on grey; masks of frames 0, 3 and 9 only."""
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "480p" / "one").mkdir(parents=True)
    for index in range(10):
        frame, ids = np.full((*SIZE, 3), GREY, np.uint8), np.zeros(SIZE, np.uint8)
        for label, colour, left in ((1, RED, 4 + 4 * index), (2, GREEN, 68)):
            frame[16:40, left : left + 24], ids[16:40, left : left + 24] = colour, label
        name = f"480p/one/{index:05}.png"
        Image.fromarray(frame).save(tmp_path / "JPEGImages" / name)
        Image.fromarray(ids).save(tmp_path / "Annotations" / name)
    whole = open_dataset("davis2016", tmp_path)[0]
    for index in set(range(10)) - {0, 3, 9}:
        whole.annotations[index] = None
    return whole


@pytest.fixture(scope="module")
def config(tiny_config: TinyConfig) -> ModelConfig:
    return tiny_config().model


def model_methods(*names: str, model: Any = None, **given: Any) -> dict[str, Method]:
    made = methods.model_methods(
        model or ColourModel(resolution=SIZE), names, Inference(**given), {}
    )
    return {method.name: method for method in made}


# The baselines without a model.


def test_the_whole_frame_is_one_object_and_the_centre_box_half_of_each_side(
    video: EvaluationVideo,
) -> None:
    whole, box = methods.lone_baselines(["whole-frame", "centre-box"])
    assert (whole.name, box.name) == ("whole frame", "centre box")
    assert not whole.seeded and not box.seeded
    found = whole.find(video, (8, 12), seed=0)
    assert found.instances.shape == (3, 8, 12) and (found.instances == 1).all()
    wanted = np.zeros((3, 8, 12), np.uint8)
    wanted[:, 2:6, 3:9] = 1
    found = box.find(video, (8, 12), seed=0)
    for labels in (found.semantic, found.instances, found.regions):
        assert labels is not None and np.array_equal(labels, wanted)
    odd = box.find(video, (5, 7), seed=0).instances[0]
    assert odd[1:4, 2:5].all() and odd.sum() == 9
    assert box.switches == {"box": "the central 0.5 of height and width"}


def test_without_a_model_only_these_can_be_scored() -> None:
    for name in ("backbone", "random"):
        with pytest.raises(UserError, match=f"The baseline {name} needs a model; give --checkp"):
            methods.lone_baselines(["whole-frame", name])
    with pytest.raises(UserError, match="nothing to score; give --checkpoint FILE"):
        methods.lone_baselines([])


def test_names_of_baselines() -> None:
    assert methods.baseline_names(["none"]) == ()
    assert methods.baseline_names(["all"]) == BASELINES
    assert methods.baseline_names(["whole-frame", "random"]) == ("random", "whole-frame")
    with pytest.raises(UserError, match="no baseline 'backbones'; did you mean 'backbone'"):
        methods.baseline_names(["backbones"])
    with pytest.raises(UserError, match="choose from backbone, random, whole-frame, centre-box"):
        methods.baseline_names(["xyzzy"])
    for name in ("all", "none"):
        with pytest.raises(UserError, match=f"--baselines {name} stands alone"):
            methods.baseline_names(["random", name])


# The model.


def test_the_model_sees_what_segment_sees(
    video: EvaluationVideo, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_run)
    asked = []

    def watched(model: SMTC, frames: Any, **given: Any) -> Any:
        asked.append((given["settings"].seed, given["batch"], isinstance(frames, Iterator)))
        return segment_frames(model, frames, **given)

    monkeypatch.setattr(methods, "segment_frames", watched)
    settings = InferenceSettings(similarity=-1, min_object=0)
    own = model_methods(model=model, settings=settings, batch=3)["model"]
    found = {seed: own.find(video, SIZE, seed) for seed in (0, 7)}
    assert asked == [(0, 3, True), (7, 3, True)]  # frames come one by one
    for seed, seen in found.items():
        drawn = InferenceSettings(similarity=-1, min_object=0, seed=seed)
        wanted = found_in(segment_frames(model, video.load_frames(), settings=drawn), [0, 3, 9])
        assert np.array_equal(seen.semantic, wanted.semantic)
        assert np.array_equal(seen.instances, wanted.instances)
    assert found[0].regions is not None and found[7].regions is not None
    assert not np.array_equal(found[0].regions, found[7].regions)


def test_the_methods_beside_a_model(tiny_run: Path, config: ModelConfig) -> None:
    model = load_model(tiny_run)
    names = ["backbone alone", "random weights", "whole frame", "centre box"]
    assert list(model_methods(*BASELINES, model=model)) == ["model", *names]
    assert list(model_methods("random", model=model)) == ["model", "random weights"]
    untrained = methods.untrained_methods(config, BASELINES, Inference(), CPU)
    assert [method.name for method in untrained] == ["random weights", names[0], *names[2:]]
    alone = methods.encoder_methods(model.encoder, BASELINES, Inference(), {}, CPU)
    assert [method.name for method in alone] == names
    assert alone[0].switches["size"] == [256, 256]


# Random weights.


def test_random_weights_are_those_of_the_seed(video: EvaluationVideo, config: ModelConfig) -> None:
    drawn = methods.untrained_methods(config, (), Inference(), CPU)[0]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = {seed: drawn.find(video, SIZE, seed) for seed in (0, 1, 0)}
    assert torch.equal(torch.get_rng_state(), before)
    for seed, seen in found.items():
        torch.manual_seed(seed)
        wanted = model_methods(model=SMTC(config))["model"].find(video, SIZE, seed)
        assert np.array_equal(seen.semantic, wanted.semantic)
        assert np.array_equal(seen.instances, wanted.instances)
    assert not np.array_equal(found[0].semantic, found[1].semantic)


def test_few_random_models_stay_in_memory(config: ModelConfig) -> None:
    made = []

    def make() -> SMTC:
        made.append(torch.initial_seed())
        return SMTC(config)

    drawn = methods._drawn(make, CPU)
    first = drawn(5)
    assert drawn(5) is first and not first.training and made == [5]
    for seed in range(4):
        drawn(seed)
    assert drawn(5) is not first and made == [5, 0, 1, 2, 3, 5]


# K-means on an encoder's features.


def test_clusters_are_objects_that_persist_and_the_border_is_background(
    video: EvaluationVideo,
) -> None:
    method, truth = model_methods("backbone", clusters=3)["backbone alone"], video.load_truth()
    behind = set()
    for seed in (0, 17, 29):
        found = method.find(video, SIZE, seed)
        assert metrics.region_similarity(found.instances > 0, truth > 0).min() > 0.85
        # The same cluster is red in all frames, and green another one.
        places = zip((0, 3, 9), found.instances, strict=True)
        ids = [[labels[28, 14 + 4 * index], labels[28, 85]] for index, labels in places]
        assert ids[0] == ids[1] == ids[2] and ids[0][0] != ids[0][1] and min(ids[0]) > 0
        background = found.semantic[0, 0, 0]
        assert np.array_equal(found.instances > 0, found.semantic != background)
        assert found.regions is found.semantic
        behind.add(int(background))
    assert len(behind) > 1  # whichever number the background's cluster has


def test_a_short_video_is_clustered_as_the_learning_table_does(video: EvaluationVideo) -> None:
    model = ColourModel(resolution=SIZE)
    features = baselines.encode_frames(model, video.load_frames())
    wanted = baselines.cluster_labels(features, 3, SIZE, seed=2)
    found = model_methods("backbone", model=model, clusters=3)["backbone alone"]
    assert np.array_equal(found.find(video, SIZE, 2).semantic, wanted[video.annotated])


def watched_encoder(sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def encode(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return torch.nn.functional.avg_pool2d(inputs, 4)

    return encode


def frames_of_two_kinds(count: int) -> Iterator[Tensor]:
    """Left and right halves differ, by the same values in every frame."""
    for index in range(count):
        frame = torch.zeros(1, 3, 16, 24)
        frame[..., 12:] = 5 + 0.001 * index
        yield frame


def test_what_is_held_of_a_long_video_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "FITTED", 24 * 5)  # five frames of 4x6 tokens
    monkeypatch.setattr(baselines, "CHUNK", 4)
    fitted: list[int] = []
    kmeans = baselines._kmeans

    def watched(points: Any, clusters: int, seed: int) -> Any:
        fitted.append(len(points))
        return kmeans(points, clusters, seed)

    monkeypatch.setattr(baselines, "_kmeans", watched)
    for count, annotated, seen in ((101, [0, 1, 2, 50, 99], 1 + 5 + 3), (3, [1], 1 + 3)):
        sizes: list[int] = []
        labels = baselines.cluster_video(
            lambda count=count: frames_of_two_kinds(count),
            count,
            annotated,
            watched_encoder(sizes),
            2,
            seed=0,
        )
        assert sum(sizes) == seen and max(sizes) <= 4
        assert labels.shape == (len(annotated), 4, 6)
        assert len(set(labels[:, :, :3].flat)) == len(set(labels[:, :, 3:].flat)) == 1
        assert labels[0, 0, 0] != labels[0, 0, 5]
    assert fitted == [24 * 5, 24 * 3]


def test_frames_that_were_not_fitted_are_labelled_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "FITTED", 24 * 2)

    def frames() -> Iterator[Tensor]:
        for index in range(9):
            yield torch.full((1, 3, 16, 24), float(index >= 4))

    labels = baselines.cluster_video(frames, 9, [0, 3, 4, 8], watched_encoder([]), 2)
    first, last = labels[0, 0, 0], labels[3, 0, 0]
    assert first != last
    assert [set(frame.flat) for frame in labels] == [{first}, {first}, {last}, {last}]


def test_an_impossible_number_of_clusters() -> None:
    for clusters in (1, 256):
        with pytest.raises(UserError, match=f"clusters is {clusters}; give 2 to 255"):
            Inference(clusters=clusters)


# An encoder alone.


def test_an_encoder_alone_sees_what_its_model_sees(
    video: EvaluationVideo, tiny_run: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_run)
    save_encoder(model.encoder, tmp_path / "encoder")
    given = Inference(settings=InferenceSettings(size=(32, 32)))
    wanted = model_methods("backbone", model=model, settings=given.settings)["backbone alone"]
    for path in (tiny_run, tmp_path / "encoder"):
        encoder = load_encoder(path)
        assert encoder.config == model.config.backbone and not encoder.training
        alone = methods.encoder_methods(encoder, (), given, {"path": "x"}, CPU)[0]
        found, other = (each.find(video, SIZE, 0) for each in (alone, wanted))
        assert np.array_equal(found.instances, other.instances)
        assert alone.weights == {"path": "x", "weights_sha256": methods.weights_hash(encoder)}


def test_random_features_are_those_of_the_seed(
    video: EvaluationVideo, tiny_run: Path, config: ModelConfig
) -> None:
    given = Inference(settings=InferenceSettings(size=(32, 32)))
    encoder = load_encoder(tiny_run)
    drawn = methods.encoder_methods(encoder, ["random"], given, {}, CPU)[1]
    assert drawn.name == "random weights"
    torch.manual_seed(4)
    other = methods.build_encoder(encoder.config).eval()
    wanted = methods.encoder_methods(other, (), given, {}, CPU)[0].find(video, SIZE, 4)
    assert np.array_equal(drawn.find(video, SIZE, 4).semantic, wanted.semantic)
    # As for a whole model, where the encoder is drawn with the rest.
    backbone = methods.untrained_methods(config, ["backbone"], given, CPU)[1]
    torch.manual_seed(4)
    model = SMTC(config)
    wanted = model_methods("backbone", model=model, settings=given.settings)["backbone alone"].find(
        video, SIZE, 4
    )
    assert np.array_equal(backbone.find(video, SIZE, 4).semantic, wanted.semantic)


# What all have in common.


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_encoder_runs_in_the_precision(
    video: EvaluationVideo, tiny_run: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_run)
    seen = set()

    def look(*_: Any) -> None:
        on = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if on else None)

    model.encoder.register_forward_hook(look)
    own = model_methods("backbone", model=model, settings=InferenceSettings(precision=precision))
    for method in own.values():
        seen.clear()
        method.find(video, SIZE, 0)
        assert seen == {{"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}


def test_what_decides_a_result_can_be_written_and_tells_methods_apart(
    tiny_run: Path, config: ModelConfig
) -> None:
    model, other = load_model(tiny_run), SMTC(config)
    made = [*model_methods(*BASELINES, model=model).values()]
    made += model_methods("backbone", model=other).values()
    made += model_methods("backbone", "random", model=model, clusters=5).values()
    small, low = InferenceSettings(size=(64, 64)), InferenceSettings(precision="bf16")
    made += model_methods("backbone", "random", model=model, settings=small).values()
    made += model_methods("backbone", model=model, settings=low).values()
    made += methods.untrained_methods(config, ["backbone"], Inference(), CPU)
    texts = [json.dumps(method.identity) for method in made]
    # Clusters do not matter to the model and to random weights, of which `untrained` is one.
    assert len(texts) == 5 + 2 + 3 + 3 + 2 + 2
    assert len(set(texts)) == len(texts) - 3
    assert all("seed" not in method.switches for method in made)
