import shutil

import numpy as np
import pytest
from PIL import Image

from smtc.errors import UserError
from smtc.evaluation.datasets import open_dataset, read_mask
from smtc.pipelines.synthetic import render_video


@pytest.fixture
def davis_like(tmp_path):
    """Two sequences of three frames with grey masks, and one more that no list names."""
    for name in ("b", "a", "c"):
        for kind in ("JPEGImages", "Annotations"):
            (tmp_path / kind / "480p" / name).mkdir(parents=True)
        for index in range(3):
            ids = np.zeros((10, 12), np.uint8)
            ids[index : index + 3] = 255
            mask = tmp_path / "Annotations" / "480p" / name / f"{index:05d}.png"
            Image.fromarray(ids).save(mask)
            frame = tmp_path / "JPEGImages" / "480p" / name / f"{index:05d}.jpg"
            Image.fromarray(np.full((10, 12, 3), 100, np.uint8)).save(frame)
    return tmp_path


def write_list(root, place, text):
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_synthetic_videos_with_masks_and_categories(synthetic_data):
    videos = open_dataset("synthetic", synthetic_data)
    assert [video.name for video in videos] == [f"{k:05d}" for k in range(6)]
    frames, masks = videos[2].load()
    true_frames, true_masks, categories = render_video(0, 2, frames=8, size=32)
    assert np.array_equal(masks, true_masks)
    assert np.abs(frames.astype(int) - true_frames).mean() < 12
    assert np.array_equal(read_mask(videos[2].categories[5]), categories[5])
    assert videos[0].annotated == list(range(8))


def test_the_official_list_names_the_sequences(davis_like):
    assert [v.name for v in open_dataset("davis2016", davis_like)] == ["a", "b", "c"]
    pair = "/JPEGImages/480p/{0}/00000.jpg /Annotations/480p/{0}/00000.png\n"
    write_list(davis_like, "480p/val.txt", pair.format("c") + pair.format("c") + pair.format("a"))
    assert [v.name for v in open_dataset("davis2016", davis_like)] == ["a", "c"]
    write_list(davis_like, "ImageSets/2016/val.txt", "b\n\n")
    videos = open_dataset("davis2016", davis_like)
    assert [v.name for v in videos] == ["b"]
    assert videos[0].categories is None
    assert videos[0].load()[1].max() == 255


def test_frames_without_a_mask_are_not_annotated(davis_like):
    video = open_dataset("davis2016", davis_like)[0]
    video.annotations[1] = None
    assert video.annotated == [0, 2]
    assert len(video.load()[1]) == 2
    assert len(video.files) == 5


def test_the_real_sample(davis2016):
    videos = open_dataset("davis2016", davis2016)
    swan = next(video for video in videos if video.name == "blackswan")
    assert len(swan.frames) == 50
    assert np.unique(read_mask(swan.annotations[7][0])).tolist() == [0, 255]


def test_what_is_not_whole_is_named(davis_like):
    def opened():
        return open_dataset("davis2016", davis_like)

    write_list(davis_like, "ImageSets/2016/val.txt", "a\nzebra\n")
    with pytest.raises(UserError, match=r"no folder .*JPEGImages/480p/zebra"):
        opened()
    write_list(davis_like, "ImageSets/2016/val.txt", "\n")
    with pytest.raises(UserError, match=r"val\.txt lists no sequences"):
        opened()
    write_list(davis_like, "ImageSets/2016/val.txt", "a\n")
    masks = davis_like / "Annotations" / "480p" / "a"
    (masks / "00001.png").rename(masks / "00007.png")
    with pytest.raises(UserError, match=r"480p/a has no mask for 00001\.jpg; it holds 3 masks"):
        opened()
    (masks / "00007.png").unlink()
    with pytest.raises(UserError, match=r"00001.* 2 masks, .*JPEGImages/480p/a 3 frames: comp"):
        opened()
    shutil.rmtree(davis_like / "Annotations")
    with pytest.raises(UserError, match=r"has no folder Annotations/480p; give the root .* compl"):
        opened()
    (davis_like / "Annotations" / "480p").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder .*Annotations/480p/a of masks; complete"):
        opened()
    for path in (davis_like / "JPEGImages" / "480p" / "a").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"JPEGImages/480p/a holds no frames \(\.jpg"):
        opened()


def test_what_is_no_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match="'coco'; choose from synthetic, davis2016"):
        open_dataset("coco", tmp_path)
    with pytest.raises(UserError, match=r"There is no folder .*absent"):
        open_dataset("synthetic", tmp_path / "absent")
    with pytest.raises(UserError, match="has no folder JPEGImages/480p"):
        open_dataset("synthetic", tmp_path)
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "480p").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no videos"):
        open_dataset("davis2016", tmp_path)


def test_damaged_files_are_named(davis_like):
    video = open_dataset("davis2016", davis_like)[0]
    mask, frame = video.annotations[1][0], video.frames[2]
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a/00001\.png: annotation, the file is cut short"):
        video.load()
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"a/00001\.png: annotation, .* mode RGB"):
        video.load()
    Image.fromarray(np.zeros((10, 11), np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"00001\.png: the mask's size 11x10 .* frames, 12x10; use"):
        video.load()
    mask.write_bytes(whole)
    frame.write_bytes(b"")
    with pytest.raises(UserError, match=r"a/00002\.jpg: the file is empty"):
        video.load()
    for (path,) in video.annotations:
        Image.fromarray(np.zeros((10, 11), np.uint8)).save(path)
    # Before any frame but the first is read.
    with pytest.raises(UserError, match=r"00000\.png: the mask's size 11x10 .* 12x10; use"):
        video.load()
