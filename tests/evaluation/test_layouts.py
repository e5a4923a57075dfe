"""Every layout with its oddities: which files belong together, and which pixels are objects."""

import itertools
import shutil

import numpy as np
import pytest
from PIL import Image
from written_datasets import (
    WRITERS,
    coloured,
    frame,
    grey_codes,
    in_grey,
    save,
    save_ids,
    square,
    write_davis2016,
    write_davis2017,
    write_fbms59,
    write_list,
    write_segtrackv2,
)

from smtc.errors import UserError
from smtc.evaluation.datasets import DATASETS, open_dataset
from smtc.evaluation.videos import read_grey

SAME_FOLDERS = {"synthetic", "davis2016"}


def videos_of(name, root, **options):
    return {video.name: video for video in open_dataset(name, root, **options)}


def truth_of(name, root, **options):
    return {key: video.load_truth() for key, video in videos_of(name, root, **options).items()}


def test_every_data_set_opens_and_loads(tmp_path):
    assert set(WRITERS) == set(DATASETS)
    for name, write in WRITERS.items():
        for video in open_dataset(name, write(tmp_path / name)):
            frames, truth = video.load()
            assert frames.shape[1:] == (40, 60, 3) and truth.shape[1:] == (40, 60)
            assert len(frames) == len(video.frames) and len(truth) == len(video.annotated)
            assert truth.dtype == np.uint8 and truth.any()
            assert all(path.is_file() for path in video.files)
            # Frames are in their order: each is ten levels brighter than the one before.
            assert (np.diff(frames[:, 0, 0, 0].astype(int)) >= 8).all()


def test_davis2016_has_three_kinds_of_masks(tmp_path):
    truth = truth_of("davis2016", write_davis2016(tmp_path))
    assert {name: np.unique(masks).tolist() for name, masks in truth.items()} == {
        "grey": [0, 255],
        "ids": [0, 1, 3],
        "palette": [0, 1],
    }
    # Whatever the value, an object is what is not 0: 100 pixels, and 25 of a second object.
    pixels = {name: np.count_nonzero(masks[0]) for name, masks in truth.items()}
    assert pixels == {"grey": 100, "palette": 100, "ids": 125}


def test_davis2017_has_void_and_the_list_of_2017(tmp_path):
    void = square() + square(25, 40, 8, 255)
    root = write_davis2017(tmp_path, {"b": [void], "a": [square(value=20)]})
    write_list(root, "ImageSets/2016/val.txt", "none")
    truth = truth_of("davis2017-unsupervised", root)
    assert list(truth) == ["a", "b"]
    assert np.array_equal(truth["b"][0], void) and truth["a"].max() == 20
    (root / "ImageSets/2017/val.txt").unlink()
    with pytest.raises(UserError, match=r"no list .*ImageSets/2017/val\.txt; write the seq"):
        open_dataset("davis2017-unsupervised", root)


@pytest.mark.parametrize("value", [21, 254])
def test_ids_that_davis2017_has_not_are_refused(tmp_path, value):
    root = write_davis2017(tmp_path, {"a": [square(), square(value=value)]})
    (video,) = open_dataset("davis2017-unsupervised", root)
    with pytest.raises(UserError, match=rf"a/00001\.png: it holds the id {value}, but DAVIS-2017"):
        video.load_truth()


def test_segtrack_merges_the_objects_of_a_sequence(tmp_path):
    videos = videos_of("segtrackv2", write_segtrackv2(tmp_path))
    assert list(videos) == ["cheetah", "girl", "penguin"]
    girl, cheetah = videos["girl"].load_truth(), videos["cheetah"].load_truth()
    # An edge of 128 belongs to the object, one of 127 does not: a column of ten pixels less.
    assert np.array_equal(girl, np.stack([square()] * 3))
    merged = square() + square(25, 40, 5)
    merged[:, 10] = 0
    assert np.array_equal(cheetah, np.stack([merged] * 3))
    assert len(videos["cheetah"].files) == 3 * (1 + 2)


def test_the_penguins_are_merged_on_demand(tmp_path):
    root = write_segtrackv2(tmp_path)
    assert np.count_nonzero(truth_of("segtrackv2", root)["penguin"][0]) == 16
    everyone = truth_of("segtrackv2", root, penguin=True)["penguin"]
    assert np.count_nonzero(everyone[0]) == 6 * 16
    assert set(np.unique(everyone)) == {0, 1}


def test_segtrack_masks_of_one_folder_need_no_subfolder(tmp_path):
    root = write_segtrackv2(tmp_path)
    shutil.rmtree(root / "GroundTruth/penguin")
    for index in range(3):
        save(root / f"GroundTruth/penguin/penguin_{index:05d}.bmp", in_grey(square(), edge=255))
    # A PNG beside a BMP of the same name is the mask.
    save(root / "GroundTruth/penguin/penguin_00001.png", in_grey(square(0, 0, 5), edge=255))
    masks = truth_of("segtrackv2", root)["penguin"]
    assert np.count_nonzero(masks, axis=(1, 2)).tolist() == [100, 25, 100]


def test_fbms_annotates_some_frames(tmp_path):
    videos = videos_of("fbms59", write_fbms59(tmp_path))
    assert {name: video.annotated for name, video in videos.items()} == {
        "camel01": [0, 2, 5],
        "cars1": [0, 3],
        "marple2": [0, 5],  # 6.jpg and 11.jpg, which comes last of 6, 7, 8, 9, 10, 11
        "marple7": [0, 3],
    }
    assert all(len(video.frames) == 6 for video in videos.values())


def test_fbms_codes_objects_in_grey(tmp_path):
    # Stripes of 12, 13, 25, 26, 102 and 103: 0.05, 0.1 and 0.4 of 255 are 12.75, 25.5 and 102.
    truth = truth_of("fbms59", write_fbms59(tmp_path))
    for name, first in (("marple7", 1), ("cars1", 3), ("marple2", 5)):
        wanted = np.zeros((40, 60), np.uint8)
        wanted[:, 4 * first : 24] = 1
        for mask in truth[name]:
            assert np.array_equal(mask, wanted), name


def test_the_newer_videos_of_fbms_have_a_white_background(tmp_path):
    truth = truth_of("fbms59", write_fbms59(tmp_path))["camel01"]
    # 5 x 10 blue pixels and 10 x 10 red ones; of the pictures of probabilities nothing is seen.
    assert np.count_nonzero(truth, axis=(1, 2)).tolist() == [150, 150, 150]
    assert truth[1][5:10, 3:13].all() and not truth[1][:, :3].any()
    assert set(np.unique(truth)) == {0, 1}


def test_a_copy_beside_a_mask_is_not_taken_for_it(tmp_path):
    root = write_fbms59(tmp_path)
    truth = root / "Testset/camel01/GroundTruth"
    save(truth / "camel01_0001_gt.jpg", square(value=255))
    save(truth / "camel01_0004_gt.png", square(value=255))
    video = videos_of("fbms59", root)["camel01"]
    assert video.annotated == [0, 2, 3, 5]
    assert video.annotations[0][0].suffix == ".ppm"
    # White is background in PPM files only.
    assert np.count_nonzero(video.load_truth()[2]) == 100


def test_masks_of_any_format_have_a_brightness(tmp_path):
    codes = grey_codes(0, 7, 200, 255)
    for suffix in ("png", "pgm", "bmp"):
        assert np.array_equal(read_grey(save(tmp_path / f"grey.{suffix}", codes)), codes)
    assert (np.abs(read_grey(save(tmp_path / "a.jpg", codes)).astype(int) - codes) < 25).all()
    colours = read_grey(save(tmp_path / "a.ppm", coloured(0)))
    assert (colours[7, 5], colours[25, 35], colours[0, 0]) == (29, 76, 255)  # blue, red, white
    # Ids of a palette are no brightness: each but 0 is an object.
    ids = read_grey(save_ids(tmp_path / "ids.png", square(value=4)))
    assert np.array_equal(ids, square(value=255))
    Image.fromarray(square() > 0).save(tmp_path / "bits.png")
    assert np.array_equal(read_grey(tmp_path / "bits.png"), square(value=255))
    Image.fromarray(codes.astype(np.uint16) * 256 + 255).save(tmp_path / "deep.pgm")
    assert np.array_equal(read_grey(tmp_path / "deep.pgm"), codes)


@pytest.mark.parametrize("suffix", ["bmp", "jpg", "pgm", "png"])
def test_damaged_masks_are_named(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", grey_codes(9, 8))
    whole = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=rf"/a\.{suffix}: .*cut short"):
            read_grey(path)
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"/a\.{suffix}: it "):
        read_grey(path)
    path.unlink()
    with pytest.raises(UserError, match=rf"/a\.{suffix}: the file is missing"):
        read_grey(path)


@pytest.mark.parametrize(("given", "wanted"), [*itertools.permutations(WRITERS, 2)])
def test_a_folder_of_another_layout_says_which(tmp_path, given, wanted):
    root = WRITERS[given](tmp_path / "data")
    if {given, wanted} == SAME_FOLDERS:
        # The same folders: only the list of sequences tells them apart.
        assert open_dataset(wanted, root)
        return
    with pytest.raises(UserError) as caught:
        open_dataset(wanted, root)
    said = str(caught.value)
    assert f"this looks like {given}: use --dataset {given}, or complete" in said
    assert said.count(". ") == 0 and "\n" not in said


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_of_no_layout_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"has no folder \w+.*; give the root folder of {name}"):
        open_dataset(name, tmp_path)


MASKS = {
    "synthetic": "Annotations/480p/00000",
    "davis2016": "Annotations/480p/grey",
    "davis2017-unsupervised": "Annotations_unsupervised/480p/dogs",
    "segtrackv2": "GroundTruth/cheetah/2",
    "fbms59": "Testset/camel01/GroundTruth",
}


@pytest.mark.parametrize("name", WRITERS)
def test_missing_ground_truth_is_named(tmp_path, name):
    root = WRITERS[name](tmp_path)
    folder = root / MASKS[name]
    mask = sorted(folder.glob("*.p*"))[1]
    mask.unlink()
    if name != "fbms59":  # which is annotated here and there
        stem = mask.stem
        lack = rf"{MASKS[name]} has no mask for {stem}\..*holds 2 masks, .* 3 frames: complete"
        with pytest.raises(UserError, match=lack):
            open_dataset(name, root)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"{MASKS[name]} holds no masks .*; complete the copy"):
        open_dataset(name, root)
    if name == "segtrackv2":
        folder = folder.parent
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no folder .* of masks; complete the copy or shorten"):
        open_dataset(name, root)


def test_a_mask_without_a_frame_is_named(tmp_path):
    root = write_segtrackv2(tmp_path)
    (root / "JPEGImages/girl/girl_00001.png").unlink()
    with pytest.raises(UserError, match="girl has a mask girl_00001 without a frame; it holds 3"):
        open_dataset("segtrackv2", root)
    root = write_fbms59(tmp_path / "fbms")
    (root / "Testset/cars1/cars1_04.jpg").unlink()
    with pytest.raises(UserError, match=r"GroundTruth/004\.png belongs to no frame of .*cars1"):
        open_dataset("fbms59", root)


def test_masks_without_a_number_belong_to_the_frame_of_their_name(tmp_path):
    root = write_fbms59(tmp_path)
    folder = root / "Testset/cars1"
    save(folder / "cover.jpg", frame(0))
    save(folder / "GroundTruth/cover.png", grey_codes(255))
    assert videos_of("fbms59", root)["cars1"].annotated == [0, 1, 4]  # what has no number is first
    (folder / "GroundTruth/cover.png").rename(folder / "GroundTruth/mean.png")
    with pytest.raises(UserError, match=r"mean\.png belongs to no frame"):
        open_dataset("fbms59", root)


def test_masks_of_another_size_are_refused_before_any_frame(tmp_path):
    wrong = np.zeros((20, 30), np.uint8)
    root = write_segtrackv2(tmp_path / "segtrack")
    save(root / "GroundTruth/cheetah/2/cheetah_00001.png", wrong)
    save(root / "GroundTruth/girl/girl_00001.png", wrong)
    videos = videos_of("segtrackv2", root)
    with pytest.raises(
        UserError, match=r"2/cheetah_00001\.png: the mask's size 30x20 .* object, 60x40"
    ):
        videos["cheetah"].load_truth()
    with pytest.raises(UserError, match=r"girl_00001\.png: the mask's size 30x20 .* 60x40; use"):
        videos["girl"].load_truth()
    root = write_fbms59(tmp_path / "fbms")
    save(root / "Testset/cars1/GroundTruth/004.png", wrong)
    video = videos_of("fbms59", root)["cars1"]
    video.frames[-1].write_bytes(b"")  # not looked at for the masks
    with pytest.raises(UserError, match=r"GroundTruth/004\.png: the mask's size 30x20"):
        video.load_truth()


def test_frames_are_read_one_by_one(tmp_path):
    video = videos_of("fbms59", write_fbms59(tmp_path))["cars1"]
    save(video.frames[2], np.zeros((40, 62, 3)))
    frames = video.iterate_frames()
    assert next(frames).shape == next(frames).shape == (40, 60, 3)
    with pytest.raises(UserError, match=r"cars1_03\.jpg: its size 62x40 is not .* first, 60x40"):
        next(frames)
    save(video.frames[2], frame(3))
    video.frames[3].write_bytes(video.frames[3].read_bytes()[:200])
    with pytest.raises(UserError, match=r"cars1_04\.jpg: the file is cut short"):
        video.load_frames()


def test_frames_may_be_bmp(tmp_path):
    video = videos_of("segtrackv2", write_segtrackv2(tmp_path))["cheetah"]
    assert np.array_equal(video.load_frames()[1], frame(1))
    video.frames[1].write_bytes(video.frames[1].read_bytes()[:300])
    with pytest.raises(UserError, match=r"cheetah_00001\.bmp: it cannot be decoded, or is cut"):
        video.load_frames()
