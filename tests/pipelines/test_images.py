"""Frames are read whole or refused; masks keep their ids."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from smtc.errors import UserError
from smtc.pipelines import images
from smtc.pipelines.images import (
    BadFrame,
    check_image,
    mask_palette,
    read_ids,
    read_image,
    write_ids,
)

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 160, 30]]], np.uint8)


def jpeg(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(path, quality=90)
    return path.read_bytes()


def test_a_png_is_read_as_rgb(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, COLOURS)


@pytest.mark.parametrize("kind", ["grey", "palette", "alpha", "deep", "deep grey"])
def test_every_kind_of_png_becomes_rgb_of_8_bits(tmp_path: Path, kind: str) -> None:
    path, grey = tmp_path / "a.png", COLOURS[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2) if "grey" in kind else COLOURS
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "palette":
        Image.fromarray(COLOURS).quantize(4).save(path)
        expected = np.array(Image.open(path).convert("RGB"))
    elif kind == "alpha":
        Image.fromarray(np.dstack([COLOURS, np.full((2, 2), 128, np.uint8)])).save(path)
    elif kind == "deep":
        cv2.imwrite(str(path), COLOURS[..., ::-1].astype(np.uint16) * 257)
    else:
        cv2.imwrite(str(path), grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), expected)


def test_an_opencv_that_reads_bgr_only_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg(tmp_path / "a.jpg")
    expected = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "_IMREAD_RGB", None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), expected)


def test_a_jpeg_is_close_to_what_another_decoder_reads(tmp_path: Path) -> None:
    jpeg(tmp_path / "v" / "a.jpg")
    expected = np.array(Image.open(tmp_path / "v" / "a.jpg")).astype(int)
    assert np.abs(read_image(tmp_path / "v" / "a.jpg") - expected).max() <= 4


def test_padding_after_the_end_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "v" / "a.jpg"
    path.write_bytes(jpeg(path) + b"\x00" * 5000 + b"\n")
    assert read_image(path).shape == (40, 60, 3)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.999])
def test_a_jpeg_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "clip" / "00003.jpg"
    whole = jpeg(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadFrame, match=r"^clip/00003\.jpg: the file is cut short$"):
        read_image(path)


def test_zeros_in_place_of_the_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip" / "00003.jpg"
    whole = jpeg(path)
    path.write_bytes(whole[:-600] + bytes(600))
    with pytest.raises(BadFrame, match="cut short"):
        read_image(path)


def test_bytes_after_the_end_are_no_fault(tmp_path: Path) -> None:
    """Cameras append films and tables; what is cut short is so whatever a thumbnail ends with."""
    for kind in ("jpg", "png"):
        whole = tmp_path / f"whole.{kind}"
        jpeg(whole) if kind == "jpg" else Image.fromarray(COLOURS).save(whole)
        data = whole.read_bytes()
        odd = tmp_path / f"odd.{kind}"
        odd.write_bytes(data + b"trailer" * 200)
        np.testing.assert_array_equal(read_image(odd), read_image(whole))
        check_image(odd)
        odd.write_bytes(data[:-40] + b"trailer" * 200)
        for read in (read_image, check_image):
            with pytest.raises(BadFrame, match="cut short"):
                read(odd)
    thumbnail = b"\xff\xe1\x00\x08ab\xff\xd9cd"
    data = (tmp_path / "whole.jpg").read_bytes()
    odd.write_bytes(data[:2] + thumbnail + data[2:-2])
    with pytest.raises(BadFrame, match="cut short"):
        read_image(odd)


def test_other_bad_files_name_file_and_reason(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "hollow.jpg").write_bytes(b"\xff\xd8 nothing \xff\xd9")
    (folder / "directory.png").mkdir()
    Image.fromarray(COLOURS).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-6])
    reasons = {
        "gone.jpg": "the file is missing",
        "empty.jpg": "the file is empty",
        "text.jpg": "it is neither a JPEG nor a PNG file but a text file; download it again",
        "hollow.jpg": "it cannot be decoded",
        "directory.png": "it cannot be read (Is a directory)",
        "cut.png": "the file is cut short",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadFrame) as caught:
            read_image(folder / name)
        assert str(caught.value) == f"clip/{name}: {reason}"
        assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("padding", [0, 1, 504, 506, 509, 510, 511, 512, 4000])
def test_the_ends_of_a_file_tell_what_reading_it_would(
    tmp_path: Path, kind: str, padding: int
) -> None:
    """Also when the end marker lies across the border of what is read first."""
    path = tmp_path / "clip" / f"00001.{kind}"
    jpeg(path)
    if kind == "png":
        Image.fromarray(COLOURS).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(padding))
    check_image(path)
    for content in (whole[:-3] + bytes(padding), whole[:9], b"", b"no picture", bytes(900)):
        path.write_bytes(content)
        with pytest.raises(BadFrame) as read:
            read_image(path)
        with pytest.raises(BadFrame) as checked:
            check_image(path)
        assert str(checked.value) == str(read.value)
    path.unlink()
    with pytest.raises(BadFrame, match="missing"):
        check_image(path)
    path.mkdir()
    with pytest.raises(BadFrame, match=r"cannot be read \(Is a directory\)"):
        check_image(path)


def test_a_decoder_that_raises_is_a_bad_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg(tmp_path / "v" / "a.jpg")

    def refuse(*_: object) -> None:
        raise cv2.error("too many pixels")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    with pytest.raises(BadFrame, match="cannot be decoded"):
        read_image(tmp_path / "v" / "a.jpg")


def test_a_bad_frame_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadFrame("/data/v/1.jpg", "the file is empty")))
    assert (str(error), error.path) == ("v/1.jpg: the file is empty", "/data/v/1.jpg")


def test_ids_survive_and_show_the_davis_colours(tmp_path: Path) -> None:
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_ids(tmp_path / "a.png", ids)
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), ids)
    shown = np.array(Image.open(tmp_path / "a.png").convert("RGB")).reshape(256, 3)
    np.testing.assert_array_equal(shown, np.frombuffer(mask_palette(), np.uint8).reshape(256, 3))
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(colour) for colour in shown[:5].tolist()] == known
    assert tuple(shown[9].tolist()) == (192, 0, 0)
    assert tuple(shown[255].tolist()) == (224, 224, 192)


@pytest.mark.parametrize("path", ["v.mp4", "./v.mp4", "inner/../v.mp4"])
def test_a_bad_frame_is_named_with_its_folder_wherever_it_is_named_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = BadFrame(path, "it is odd")
    assert (str(error), error.path) == (f"{tmp_path.name}/v.mp4: it is odd", path)


def test_masks_without_ids_are_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    with pytest.raises(BadFrame, match="mode RGB"):
        read_ids(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n IEND\xae\x42\x60\x82")
    with pytest.raises(BadFrame, match="cannot be decoded"):
        read_ids(tmp_path / "b.png")


def test_a_mask_of_one_bit_is_read_as_0_and_255(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_ids(tmp_path / "a.png").tolist() == [[255, 0]]


@pytest.mark.parametrize("read", [read_image, check_image])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadFrame, match="it is no regular file"):
        read(tmp_path / "pipe.jpg")
