"""`smtc segment` in Python: a video in, a folder of masks, scores and an overlay out."""

import json
import weakref

import cv2
import numpy as np
import pytest
import torch
from colour_model import GREEN, GREY, RED, ColourModel
from PIL import Image

from smtc.errors import UserError
from smtc.film import film
from smtc.inference import CHUNK, InferenceSettings, segment
from smtc.model import SMTC
from smtc.pipelines.frame_source import FrameSource
from smtc.segment_video import segment_video


def scene(frames=6, size=(64, 96)):
    """Grey frames with a red box on the left and a green one on the right."""
    video = np.full((frames, *size, 3), GREY, np.uint8)
    video[:, 16:40, 8:32] = RED
    video[:, 24:48, 60:84] = GREEN
    return video


def write_frames(folder, frames, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{index}{suffix}"), frame[..., ::-1])
    return folder


def read_masks(folder):
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())])


def test_a_folder_of_frames_becomes_masks_scores_and_an_overlay(tmp_path):
    video = scene(frames=11)
    video[10, :8] = 255
    folder, output = write_frames(tmp_path / "boxes", video), tmp_path / "out"
    found = segment_video(ColourModel(), folder, output)
    names = sorted(p.name for p in output.iterdir())
    assert names == [".smtc", "masks", "overlay.mp4", "scores.json"]
    masks = sorted((output / "masks" / "boxes").iterdir())
    assert [p.name for p in masks] == [f"{k:05d}.png" for k in range(11)]
    wanted = segment(ColourModel(), video)
    for path, mask in zip(masks, wanted.masks, strict=True):
        with Image.open(path) as image:
            assert image.mode == "P"
            assert image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
            assert np.array_equal(np.array(image), mask)
    written = json.loads((output / "scores.json").read_text())
    assert (written["video"], written["maps"]) == ("boxes", "instance")
    assert written["settings"]["min_object"] == 0.001
    assert written["frames"] == [{str(k): v for k, v in s.items()} for s in wanted.scores]
    assert written["objects"] == {str(k): v for k, v in found.objects.items()}
    assert found.frames == 11
    assert found.objects[1] == {"first": 0, "last": 10, "frames": 11, "score": 1.0}
    film = cv2.VideoCapture(str(output / "overlay.mp4"))
    assert (film.get(cv2.CAP_PROP_FRAME_COUNT), film.get(cv2.CAP_PROP_FPS)) == (11, 10)
    shown = film.read()[1]
    assert shown.shape == (64, 96, 3)
    # The grey background stays, the red box is tinted.
    assert np.abs(shown[60, 50].astype(int) - 128).max() < 20
    assert np.abs(shown[28, 20].astype(int) - (0, 0, 255)).max() > 40


def test_a_video_file_gives_what_its_frames_give(tmp_path):
    path = tmp_path / "boxes.mp4"
    with film(path, 24.0) as add:
        for frame in scene(frames=CHUNK + 5):
            add(frame)
    found = segment_video(ColourModel(), path, tmp_path / "out")
    assert (found.frames, len(found.objects)) == (CHUNK + 5, 2)
    masks = read_masks(tmp_path / "out" / "masks" / "boxes")
    assert masks.shape == (CHUNK + 5, 64, 96)
    assert masks[-1, 28, 20] == 1 and masks[-1, 36, 72] == 2
    shown = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4"))
    assert shown.get(cv2.CAP_PROP_FPS) == 24
    segment_video(ColourModel(), path, tmp_path / "slow", rate=5)
    shown = cv2.VideoCapture(str(tmp_path / "slow" / "overlay.mp4"))
    assert shown.get(cv2.CAP_PROP_FPS) == 5


@pytest.mark.parametrize("maps", ["instance", "semantic"])
def test_a_page_to_look_at_it(tmp_path, maps):
    folder = write_frames(tmp_path / "in", scene())
    segment_video(ColourModel(), folder, tmp_path / "out", viewer=True, maps=maps)
    page = (tmp_path / "out" / "viewer.html").read_text()
    assert page.count("data:image/jpeg") == page.count("data:image/png") == 6
    # Names are what is in the masks: the semantics 1 and 2, of which 0 is background.
    names = ["semantic 1", "semantic 2"] if maps == "semantic" else ["object 1", "object 2"]
    assert all(name in page for name in names) and names[0][:-1] + "3" not in page
    segment_video(ColourModel(), folder, tmp_path / "out")
    assert not (tmp_path / "out" / "viewer.html").exists()


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_short_videos(tmp_path, frames):
    found = segment_video(
        ColourModel(), write_frames(tmp_path / "in", scene(frames)), tmp_path / "out"
    )
    assert found.frames == frames
    assert len(list((tmp_path / "out" / "masks" / "in").iterdir())) == frames


def test_an_image_and_a_single_pixel(tmp_path):
    write_frames(tmp_path / "in", scene(1))
    segment_video(ColourModel(), tmp_path / "in" / "0.png", tmp_path / "image")
    assert (tmp_path / "image" / "masks" / "0" / "00000.png").exists()
    pixel = write_frames(tmp_path / "pixel", np.full((2, 1, 1, 3), 90, np.uint8))
    segment_video(ColourModel(), pixel, tmp_path / "one")
    assert read_masks(tmp_path / "one" / "masks" / "pixel").shape == (2, 1, 1)


def test_frames_of_4k(tmp_path):
    large = write_frames(
        tmp_path / "4k", scene(2).repeat(36, 1).repeat(40, 2)[:, :2160, :3840], ".jpg"
    )
    segment_video(ColourModel(), large, tmp_path / "out")
    masks = read_masks(tmp_path / "out" / "masks" / "4k")
    assert masks.shape == (2, 2160, 3840)
    assert masks[0, 28 * 36, 20 * 40] == 1 and masks[0, 36 * 36, 72 * 40] == 2
    shown = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4")).read()[1]
    assert shown.shape == (1080, 1920, 3)


def test_semantic_maps(tmp_path):
    folder = write_frames(tmp_path / "in", scene())
    segment_video(ColourModel(), folder, tmp_path / "out", maps="semantic")
    masks = read_masks(tmp_path / "out" / "masks" / "in")
    assert np.array_equal(masks, segment(ColourModel(), scene()).semantic)
    assert masks[0, 28, 20] == 1 and masks[0, 36, 72] == 2 and masks[0, 0, 0] == 0
    shown = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4")).read()[1]
    assert np.abs(shown[60, 50].astype(int) - 128).max() < 20
    # Ids of objects are in no file.
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written.keys() == {"video", "maps", "settings", "background"}
    assert written["background"] == [0] * 6


def test_the_same_command_gives_the_same_bytes(tmp_path, tiny_config):
    torch.manual_seed(0)
    model = SMTC(tiny_config().model)
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 56, 3), dtype=np.uint8)
    folder = write_frames(tmp_path / "in", noise)
    for name in ("a", "b"):
        segment_video(model, folder, tmp_path / name)
    first, second = (
        {
            p.relative_to(tmp_path / name): p.read_bytes()
            for p in (tmp_path / name).rglob("*.*")
            if p.is_file()
        }
        for name in ("a", "b")
    )
    assert len(first) == 9 and first == second


def test_an_earlier_result_is_replaced_and_anything_else_refused(tmp_path):
    output = tmp_path / "out"
    many, few = write_frames(tmp_path / "a" / "first", scene(2)), tmp_path / "b" / "first"
    write_frames(few, scene(1))
    segment_video(ColourModel(), many, output)
    segment_video(ColourModel(), few, output)
    assert [p.name for p in (output / "masks" / "first").iterdir()] == ["00000.png"]
    with pytest.raises(UserError, match="already holds masks of 'first', not of 'second'"):
        segment_video(ColourModel(), write_frames(tmp_path / "second", scene(2)), output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds 'notes\.txt'"):
        segment_video(ColourModel(), many, output)
    assert [p.name for p in (output / "masks").iterdir()] == ["first"]


def test_masks_made_by_hand_are_never_deleted(tmp_path):
    mine = tmp_path / "precious" / "masks" / "handmade" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    boxes, output = write_frames(tmp_path / "boxes", scene(2)), tmp_path / "out"
    with pytest.raises(UserError, match="precious already holds 'masks'"):
        segment_video(ColourModel(), boxes, tmp_path / "precious")
    # Nor those that were put into a folder of ours.
    segment_video(ColourModel(), boxes, output)
    mine.parent.rename(output / "masks" / "handmade")
    with pytest.raises(UserError, match="already holds masks of 'handmade'"):
        segment_video(ColourModel(), boxes, output)
    assert (output / "masks" / "handmade" / "a.txt").read_text() == "mine"


def test_an_output_that_is_refused_costs_no_work(tmp_path):
    model, output = ColourModel(), tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="thesis"):
        segment_video(model, write_frames(tmp_path / "boxes", scene(2)), output)
    assert model.calls == []


def test_a_bad_frame_leaves_nothing_behind(tmp_path):
    folder = write_frames(tmp_path / "in" / "boxes", scene(frames=CHUNK + 5), ".jpg")
    bad = folder / f"{CHUNK + 4}.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"boxes/{CHUNK + 4}\.jpg"):
        segment_video(ColourModel(), folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_impossible_wishes(tmp_path):
    folder = write_frames(tmp_path / "in", scene(1))
    for rate in (0, -1, float("nan"), 1e6):
        with pytest.raises(UserError, match="give frames a second"):
            segment_video(ColourModel(), folder, tmp_path / "out", rate=rate)
    model = ColourModel()
    model.config.slots = 300
    with pytest.raises(UserError, match="300 semantic slots are more than the 255"):
        segment_video(model, folder, tmp_path / "out", maps="semantic")
    with pytest.raises(UserError, match="no multiple"):
        segment_video(
            ColourModel(), folder, tmp_path / "out", preset=InferenceSettings(size=(9, 8))
        )
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("room", [40, 400])
def test_a_full_disk(tmp_path, mounted, room):
    """Where the masks do not fit, or the film: one sentence, and nothing half-written."""
    folder = write_frames(
        tmp_path / "in", np.random.default_rng(0).integers(0, 256, (9, 400, 600, 3), dtype=np.uint8)
    )
    disk = mounted(f"size={room}k")
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        segment_video(ColourModel(resolution=(64, 96)), folder, disk / "out")
    assert list(disk.iterdir()) == []


class Held(np.ndarray):
    """An array that can be watched."""


def test_memory_does_not_grow_with_the_video(tmp_path):
    """No more frames are held than a chunk has, whatever the length."""
    held, most = set(), []

    class Frames(FrameSource):
        def __len__(self):
            return 5 * CHUNK

        def __iter__(self):
            for _ in range(5 * CHUNK):
                frame = scene(1)[0].view(Held)
                held.add(id(frame))
                weakref.finalize(frame, held.discard, id(frame))
                most.append(len(held))
                yield frame

    segment_video(ColourModel(), Frames("long", ()), tmp_path / "out")
    assert CHUNK <= max(most) <= CHUNK + 2


def test_a_real_sequence(davis2016, tmp_path):
    frames = sorted((davis2016 / "JPEGImages" / "480p" / "car-shadow").iterdir())
    torch.set_num_threads(1)
    folder = tmp_path / "car-shadow"
    folder.mkdir()
    for path in frames[:5]:
        (folder / path.name).symlink_to(path)
    segment_video(ColourModel(), folder, tmp_path / "out")
    with Image.open(tmp_path / "out" / "masks" / "car-shadow" / "00004.png") as image:
        assert image.size == (854, 480)
