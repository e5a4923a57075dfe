import json

import cv2
import numpy as np
import pytest
import torch
from colour_model import GREEN, GREY, RED, ColourModel
from PIL import Image

from smtc import inference
from smtc.errors import UserError
from smtc.evaluation.datasets import open_dataset
from smtc.inference import InferenceSettings, predict, segment, segment_folder, write_segmentation
from smtc.model import SMTC


def scene(frames=6, size=(64, 96)):
    """Grey frames with a red box on the left and a green one on the right."""
    video = np.full((frames, *size, 3), GREY, np.uint8)
    video[:, 16:40, 8:32] = RED
    video[:, 24:48, 60:84] = GREEN
    return video


def core(mask, top, left):
    """The ids in the inner part of a 24 pixel box, away from upsampled borders."""
    return set(np.unique(mask[:, top + 8 : top + 16, left + 8 : left + 16]).tolist())


def write_frames(folder, frames, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{index}{suffix}"), frame[..., ::-1])
    return folder


def test_objects_are_found_with_ids_scores_and_semantics():
    model = ColourModel(scores=((1, 1), (0.75, 0.1), (0.1, 0.5)))
    found = segment(model, scene())
    assert found.masks.shape == found.semantic.shape == (6, 64, 96)
    assert found.masks.dtype == found.semantic.dtype == np.uint8
    # id = n * P + p + 1: red is semantic 1 on the left, green semantic 2 on the right.
    assert core(found.masks, 16, 8) == {3}
    assert core(found.masks, 24, 60) == {6}
    assert set(np.unique(found.masks)) == {0, 3, 6}
    assert (found.masks[:, 0] == 0).all()
    assert core(found.semantic, 16, 8) == {1}
    assert core(found.semantic, 24, 60) == {2}
    assert found.scores == [{3: 0.75, 6: 0.5}] * 6


def test_candidates_below_the_similarity_are_left_out():
    found = segment(ColourModel(scores=((0.2, 0.2), (0.4999, 0.2), (1, 1))), scene())
    # The background competes whatever its scores, so nothing else takes the red box.
    assert core(found.masks, 16, 8) == {0}
    assert core(found.masks, 24, 60) == {6}


def test_a_semantic_must_cover_the_area_asked_for():
    video = scene()
    video[:, :, 48:] = np.where(np.arange(48)[:, None] < 40, GREEN, GREY)
    # Green covers more than a third, red less than a tenth; grey still holds most of the border.
    video[:, 54:, 48:] = GREY
    found = segment(ColourModel(), video, preset=InferenceSettings(min_area=0.2))
    assert set(np.unique(found.masks)) == {0, 6}
    assert {3, 6} <= set(np.unique(segment(ColourModel(), video).masks))


def test_background_is_the_slot_on_most_of_the_border_of_the_video():
    video = scene()
    video[0, :, :] = GREEN
    prediction = predict(ColourModel(), video)
    assert prediction.background == 0
    assert predict(ColourModel(), video[:1]).background == 2


def test_masks_are_soft_and_sum_to_one():
    prediction = predict(ColourModel(sharpness=1.0), scene(frames=3))
    assert prediction.semantic.shape == (3, 3, 8, 8)
    assert torch.allclose(prediction.semantic.sum(1), torch.ones(3, 8, 8))
    assert torch.allclose(prediction.instance.sum(2), prediction.semantic)
    assert prediction.scores.shape == (3, 3, 2)


@pytest.mark.parametrize(("count", "batch", "clips"), [(6, 1, [1, 1]), (6, 2, [2]), (9, 2, [2, 1])])
def test_windows_do_not_overlap_and_the_last_frame_fills_the_last_window(count, batch, clips):
    model, seen = ColourModel(), []
    encode = model.features
    model.features = lambda clip: seen.append(clip[..., 0, 0]) or encode(clip)
    video = scene(frames=count)
    video[:, 0, 0] = np.arange(count)[:, None]
    video = np.repeat(video[:, :1, :1], 64, 1).repeat(96, 2)
    prediction = predict(model, iter(video), batch=batch)
    assert len(prediction.semantic) == count
    assert [shape[0] for shape, _ in model.calls] == clips
    red = torch.cat([clip[:, :, 0].flatten() for clip in seen]) * 0.229 + 0.485
    order = [min(k, count - 1) for k in range(len(red))]
    assert (red * 255).round().int().tolist() == order


def test_the_model_is_left_in_the_modes_it_had():
    model = ColourModel().train()
    model.dropout.eval()
    segment(model, scene(frames=1))
    assert model.training and not model.dropout.training


def test_official_preset_follows_the_authors_script(monkeypatch):
    model = ColourModel(scores=((0.6, 0.6), (1, 0.1), (0.1, 0.9)), sharpness=3.0)
    given = {}
    prepare = inference.prepare_frames

    def watched(frames, size, **statistics):
        given.update(statistics)
        return prepare(frames, size, **statistics)

    monkeypatch.setattr(inference, "prepare_frames", watched)
    found = segment(model, scene(), preset="official")
    assert model.calls[0] == ((1, 4, 3, 480, 800), 5)
    assert given["mean"] == (0.43216, 0.394666, 0.37645)
    assert given["std"] == (0.22803, 0.22145, 0.216989)
    assert core(found.masks, 16, 8) == {3}
    assert core(found.masks, 24, 60) == {6}
    # The background is a candidate like any other here.
    assert set(np.unique(found.masks)) == {1, 2, 3, 6}


def test_threshold_masks_are_stretched_nearest_and_painted_by_rising_score():
    instance = torch.zeros(2, 1, 2, 2)
    instance[0, 0] = torch.tensor([[0.10, 0.13], [0.14, 0.20]])  # stretched: 0, .3, .4, 1
    instance[1, 0] = torch.tensor([[0.5, 0.0], [0.0, 0.9]])
    yes, scores = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[0.9], [0.6]])
    mask = inference._paint(instance, yes, scores, 0.31, (4, 4))
    assert mask.tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert inference._paint(instance, yes, 1 - scores, 0.31, (2, 2)).tolist() == [[2, 0], [1, 2]]
    flat = torch.full((2, 1, 2, 2), 0.7)
    assert not inference._paint(flat, yes, scores, 0.3, (4, 4)).any()


def test_winners_is_the_argmax_of_bilinearly_upsampled_masks():
    masks = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.interpolate(masks[None], (33, 50), mode="bilinear")[0]
    assert np.array_equal(inference.winners(masks, (33, 50)), soft.argmax(0).numpy())
    assert not inference.winners(torch.ones(3, 2, 2), (4, 4)).any()


def test_a_real_model_gives_the_same_whatever_the_batch(tiny_config):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = SMTC(tiny_config().model)
    video = np.random.default_rng(0).integers(0, 256, (7, 40, 56, 3), dtype=np.uint8)
    one, three = segment(model, video), segment(model, list(video), batch=3)
    assert np.mean(one.masks != three.masks) < 1e-3
    assert one.masks.max() <= model.config.slots * model.config.instances
    assert all(
        set(s) == set(np.unique(m)) - {0} for s, m in zip(one.scores, one.masks, strict=True)
    )


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ([], "no frames"),
        (np.zeros((2, 8, 8, 3), np.float32), "Frame 0 is float32"),
        (np.zeros((2, 8, 8), np.uint8), r"uint8 \[8, 8\]; frames must be RGB"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "one size"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\]; .* of one pixel at least"),
        (iter([np.zeros((8, 8, 3), np.uint8)]), "The frames are a list_iterator; give an array"),
        (None, "The frames are a NoneType"),
        (np.array(3), "The frames are a ndarray"),
        ("frames.mp4", "The frames are a str"),
        ([[[[0, 0, 0]]]], "Frame 0 is a list; frames must be NumPy arrays"),
    ],
)
def test_frames_that_are_no_video_are_refused(frames, sentence):
    with pytest.raises(UserError, match=sentence):
        segment(ColourModel(), frames)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="'authors'; choose from default, official"):
        segment(ColourModel(), scene(), preset="authors")
    for batch in (0, -1, 1.5):
        with pytest.raises(UserError, match=f"batch is {batch}; give a whole number"):
            segment(ColourModel(), scene(), batch=batch)
    with pytest.raises(UserError, match="no frames"):
        predict(ColourModel(), iter([]))
    prediction = inference.Prediction(
        torch.ones(1, 64, 2, 2), torch.ones(1, 64, 4, 2, 2), torch.ones(1, 64, 4)
    )
    with pytest.raises(UserError, match="256 instance slots are more than the 255 ids"):
        inference.render(prediction, 0, (4, 4), InferenceSettings())


def test_a_folder_of_frames_becomes_masks_scores_and_an_overlay(tmp_path):
    video = scene(frames=11)
    video[10, :8] = 255
    folder = write_frames(tmp_path / "boxes", video)
    output = segment_folder(ColourModel(), folder, tmp_path / "out")
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
    assert written["video"] == "boxes"
    assert written["frames"] == [{str(k): v for k, v in s.items()} for s in wanted.scores]
    film = cv2.VideoCapture(str(output / "overlay.mp4"))
    assert (film.get(cv2.CAP_PROP_FRAME_COUNT), film.get(cv2.CAP_PROP_FPS)) == (11, 10)
    shown = film.read()[1]
    assert shown.shape == (64, 96, 3)
    # The grey background stays, the red box is tinted.
    assert np.abs(shown[60, 50].astype(int) - 128).max() < 20
    assert np.abs(shown[28, 20].astype(int) - (0, 0, 255)).max() > 40


def test_an_earlier_result_is_replaced_and_anything_else_refused(tmp_path):
    output = tmp_path / "out"
    found = segment(ColourModel(), scene(frames=2))
    write_segmentation(output, "first", scene(frames=2), found)
    write_segmentation(output, "first", scene(frames=1), list(found)[:1])
    assert [p.name for p in (output / "masks" / "first").iterdir()] == ["00000.png"]
    with pytest.raises(UserError, match="already holds masks of 'first', not of 'second'"):
        write_segmentation(output, "second", scene(frames=2), found)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds 'notes\.txt'"):
        write_segmentation(output, "first", scene(frames=2), found)
    assert [p.name for p in (output / "masks").iterdir()] == ["first"]


def test_masks_made_by_hand_are_never_deleted(tmp_path):
    mine = tmp_path / "precious" / "masks" / "handmade" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    boxes = write_frames(tmp_path / "boxes", scene(2))
    with pytest.raises(UserError, match="precious already holds 'masks'"):
        segment_folder(ColourModel(), boxes, tmp_path / "precious")
    # Nor those that were put into a folder of ours.
    output = segment_folder(ColourModel(), boxes, tmp_path / "out")
    mine.parent.rename(output / "masks" / "handmade")
    with pytest.raises(UserError, match="already holds masks of 'handmade'"):
        segment_folder(ColourModel(), boxes, output)
    assert (output / "masks" / "handmade" / "a.txt").read_text() == "mine"


def test_an_output_that_is_refused_costs_no_work(tmp_path):
    model, output = ColourModel(), tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="thesis"):
        segment_folder(model, write_frames(tmp_path / "boxes", scene(2)), output)
    assert model.calls == []


def test_a_bad_frame_leaves_nothing_behind(tmp_path):
    folder = write_frames(tmp_path / "in" / "boxes", scene(frames=5), ".jpg")
    bad = folder / "4.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"boxes/4\.jpg"):
        segment_folder(ColourModel(), folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_folders_that_are_no_video_are_refused(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        segment_folder(ColourModel(), tmp_path / "absent", tmp_path / "out")
    write_frames(tmp_path / "two" / "a", scene(1))
    write_frames(tmp_path / "two" / "b", scene(1))
    with pytest.raises(UserError, match=r"holds 2 videos; give the folder of one, such as .*two/a"):
        segment_folder(ColourModel(), tmp_path / "two", tmp_path / "out")
    uneven = write_frames(tmp_path / "uneven", scene(2))
    cv2.imwrite(str(uneven / "2.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"2\.png differs in size"):
        segment_folder(ColourModel(), uneven, tmp_path / "out")


def test_an_opencv_without_the_codec_is_named(tmp_path, monkeypatch):
    class NoWriter:
        def __init__(self, *_):
            pass

        fourcc = staticmethod(lambda *_: 0)
        isOpened = staticmethod(lambda: False)  # noqa: N815
        release = staticmethod(lambda: None)

    monkeypatch.setattr(inference.cv2, "VideoWriter", NoWriter)
    with pytest.raises(UserError, match="cannot write MPEG-4"):
        write_segmentation(tmp_path / "out", "boxes", scene(1), segment(ColourModel(), scene(1)))
    assert not list(tmp_path.iterdir())


def test_a_real_sequence(davis2016, tmp_path):
    video = next(v for v in open_dataset("davis2016", davis2016) if v.name == "car-shadow")
    torch.set_num_threads(1)
    folder = tmp_path / "car-shadow"
    folder.mkdir()
    for path in video.frames[:5]:
        (folder / path.name).symlink_to(path)
    output = segment_folder(ColourModel(), folder, tmp_path / "out")
    with Image.open(output / "masks" / "car-shadow" / "00004.png") as image:
        assert image.size == (854, 480)
