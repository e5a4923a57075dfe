"""The synthetic set is what its difficulty says, the same every time, and never half-written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smtc.errors import UserError
from smtc.pipelines import synthetic
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import read_ids, read_image
from smtc.pipelines.synthetic import CATEGORIES, render_video, synthesize

LEVELS = ("standard", "instances", "hard")


def categories_of(instances: np.ndarray, categories: np.ndarray) -> list[int]:
    """The category of each object, which must be one."""
    found = []
    for number in range(1, int(instances.max()) + 1):
        values = np.unique(categories[instances == number])
        assert len(values) == 1
        found.append(int(values[0]))
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_a_video_is_a_pure_function_of_seed_and_index(level: str) -> None:
    one = render_video(3, 5, frames=4, size=48, difficulty=level)
    again = render_video(3, 5, frames=4, size=48, difficulty=level)
    for array, same in zip(one, again, strict=True):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, same)
    assert [array.shape for array in one] == [(4, 48, 48, 3), (4, 48, 48), (4, 48, 48)]
    for seed, index in ((3, 6), (4, 5)):
        other = render_video(seed, index, frames=4, size=48, difficulty=level)
        assert np.mean(one[0] == other[0]) < 0.2


def test_the_standard_level() -> None:
    counts, covered = set(), []
    for index in range(40):
        _, instances, categories = render_video(1, index)
        kinds = categories_of(instances, categories)
        assert len(set(kinds)) == len(kinds)
        assert set(kinds) <= set(range(1, len(CATEGORIES) + 1))
        np.testing.assert_array_equal(instances == 0, categories == 0)
        counts.add(len(kinds))
        covered.append((instances > 0).mean())
        # Without overlap every object keeps its size but for the pixel grid.
        areas = np.stack([(instances == k + 1).sum((1, 2)) for k in range(len(kinds))])
        assert (areas.min(1) > 0.9 * areas.max(1)).all()
    assert counts == {2, 3}
    assert 0.23 < np.mean(covered) < 0.27
    assert min(covered) > 0.2


@pytest.mark.parametrize(("level", "counts"), [("instances", {3, 4}), ("hard", {4, 5, 6})])
def test_the_levels_with_instances(level: str, counts: set[int]) -> None:
    seen, occluded = set(), 0
    for index in range(30):
        _, instances, categories = render_video(2, index, difficulty=level)
        kinds = categories_of(instances, categories)
        seen.add(len(kinds))
        assert max(kinds.count(kind) for kind in kinds) == 2
        areas = np.stack([(instances == k + 1).sum((1, 2)) for k in range(len(kinds))])
        assert areas.min() >= 30
        occluded += bool((areas.min(1) < 0.85 * areas.max(1)).any())
    assert seen == counts
    assert occluded >= 15


def test_objects_move_at_their_speed_and_stay_inside() -> None:
    y, x = np.mgrid[:96, :96]
    speeds = []
    for index in range(20):
        _, instances, _ = render_video(4, index)
        assert not instances[:, [0, -1]].any()
        assert not instances[:, :, [0, -1]].any()
        for number in range(1, int(instances.max()) + 1):
            inside = instances == number
            area = inside.sum((1, 2))
            centre = np.stack([(inside * x).sum((1, 2)), (inside * y).sum((1, 2))]) / area
            speeds.append(np.linalg.norm(np.diff(centre), axis=0).max())
    assert min(speeds) > 1.4
    assert 3.0 < max(speeds) < 3.7


def test_colour_alone_does_not_separate() -> None:
    """Mean colours of object and background differ far less than the two colours within either."""
    apart, within = [], []
    for index in range(30):
        frames, instances, _ = render_video(6, index)
        inside, outside = frames[instances > 0] / 255, frames[instances == 0] / 255
        apart.append(np.linalg.norm(inside.mean(0) - outside.mean(0)))
        within.append(np.sqrt(outside.var(0).sum()))
    assert np.mean(apart) < 0.25 * np.mean(within)


def test_light_changes_at_the_hard_level_only() -> None:
    def drift(level: str) -> float:
        """How far the mean brightness of a video's frames is spread, at most, in six videos."""
        videos = [render_video(7, i, difficulty=level)[0].mean((1, 2, 3)) for i in range(6)]
        return max(float(np.ptp(means) / means.mean()) for means in videos)

    assert drift("standard") < 0.05
    assert drift("hard") > 0.2


def test_the_set_is_in_the_davis_layout(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "set", videos=3, frames=4, size=48, seed=9, difficulty="hard")
    assert [video.name for video in find_videos(root)] == ["00000", "00001", "00002"]
    image, instances, categories = render_video(9, 2, frames=4, size=48, difficulty="hard")
    for number in range(4):
        annotated = root / "Annotations" / "480p" / "00002" / f"{number:05d}.png"
        np.testing.assert_array_equal(read_ids(annotated), instances[number])
        categorised = root / "Categories" / "480p" / "00002" / f"{number:05d}.png"
        np.testing.assert_array_equal(read_ids(categorised), categories[number])
        with Image.open(annotated) as one, Image.open(categorised) as other:
            assert one.mode == other.mode == "P"
            assert one.getpalette() == other.getpalette()
        stored = read_image(root / "JPEGImages" / "480p" / "00002" / f"{number:05d}.jpg")
        assert np.abs(stored.astype(int) - image[number]).mean() < 4
    assert json.loads((root / "synthetic.json").read_text()) == {
        "version": synthetic.VERSION,
        "seed": 9,
        "difficulty": "hard",
        "videos": 3,
        "frames": 4,
        "size": 48,
        "categories": list(CATEGORIES),
    }
    assert os.listdir(tmp_path) == ["set"]


def test_the_same_set_is_left_as_it_is(videos: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in videos.rglob("*")}
    assert synthesize(videos, videos=8, size=48, seed=5) == videos
    assert {path: path.stat().st_mtime_ns for path in videos.rglob("*")} == before


def test_another_set_is_refused(videos: Path) -> None:
    with pytest.raises(UserError, match="synthetic set with seed 5 instead of 6"):
        synthesize(videos, videos=8, size=48, seed=6)


@pytest.mark.parametrize("content", ["notes.txt", "synthetic.json"])
def test_something_else_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / content).write_text("[]")
    with pytest.raises(UserError, match="already holds something else"):
        synthesize(tmp_path / "set", videos=1)
    assert (tmp_path / "set" / content).read_text() == "[]"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(UserError, match="already holds something else"):
        synthesize(tmp_path / "set", videos=1)
    with pytest.raises(UserError, match="cannot be written"):
        synthesize(tmp_path / "set" / "inner", videos=1)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    synthesize(tmp_path / "set", videos=1, frames=2, size=32)
    assert len(find_videos(tmp_path / "set")[0].frames) == 2


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "write_ids", fail)
    with pytest.raises(UserError, match="No space left"):
        synthesize(tmp_path / "set", videos=2, frames=2, size=32)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"videos": 0}, "videos is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"size": 8}, "size is 8"),
        ({"seed": -1}, "seed is -1"),
        ({"difficulty": "easy"}, "no difficulty 'easy'; choose from standard, instances, hard"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        synthesize(tmp_path / "set", **settings)
    assert os.listdir(tmp_path) == []
