"""Files that are not what their names say: read where they can be, else called what they are."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Command, frames_of, train_flags
from PIL import Image

from smtc.pipelines.file_kinds import told
from smtc.pipelines.images import BadFrame, check_image, read_ids, read_image

PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
IMAGE, VIDEO = "; convert it to JPEG or PNG", "; give videos as files of their own"


def saved(kind: str) -> bytes:
    """The picture as PIL writes it."""
    box = io.BytesIO()
    Image.fromarray(PICTURE).save(box, kind)
    return box.getvalue()


STRANGERS = {
    "a WebP image" + IMAGE: saved("WEBP"),
    "a GIF image" + IMAGE: saved("GIF"),
    "a BMP image" + IMAGE: saved("BMP"),
    "a TIFF image" + IMAGE: saved("TIFF"),
    "a HEIC image" + IMAGE: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "an AVIF image" + IMAGE: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
    "an MP4 or MOV video" + VIDEO: b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
    "a Matroska or WebM video" + VIDEO: b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0#B\x86\x81\x01",
    "an AVI video" + VIDEO: b"RIFF\0\0\0\0AVI LIST",
    "an archive; unpack it": b"PK\x03\x04\x14\0\0\0",
    "an HTML page; download it again": b"\n<!DOCTYPE html><title>404 Not found</title>",
    "an XML or SVG file" + IMAGE: b"<?xml version='1.0'?><svg/>",
    "a text file; download it again": b"id,mask\n1,2\n",
    "nothing but zero bytes; download it again": bytes(900),
    "a Git LFS pointer; fetch its content with `git lfs pull`": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    ),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_called_what_it_is(tmp_path: Path, what: str) -> None:
    file = tmp_path / "00000.jpg"
    file.write_bytes(STRANGERS[what])
    for read in (read_image, check_image, read_ids):
        with pytest.raises(BadFrame) as caught:
            read(file)
        assert caught.value.reason == f"it is neither a JPEG nor a PNG file but {what}"


@pytest.mark.parametrize("content", [b"\x00", b"\x93NUMPY\x01\0", b"\xd8\xff", saved("PPM")])
def test_nothing_is_said_of_what_is_not_known(content: bytes) -> None:
    assert told(b"\x01" + content) is None


def test_strangers_among_the_frames(cli: Command, synthetic_data: Path, tmp_path: Path) -> None:
    """Two videos of them, and one of PNG files called JPEG, which is no fault."""
    videos = Path(shutil.copytree(synthetic_data, tmp_path / "videos"))
    names = list(STRANGERS)
    for number, content in enumerate(STRANGERS.values()):
        video, frame = divmod(number, 8)
        (frames_of(videos, f"{video:05}") / f"{frame:05}.jpg").write_bytes(content)
    for frame_file in frames_of(videos, "00002").iterdir():
        frame_file.write_bytes(saved("PNG"))

    inspected = cli("data", "inspect", videos, "--output", tmp_path / "cache", "--workers", 1)
    assert inspected.code == 1
    assert f"broken     {len(STRANGERS)} files\n" in inspected.out
    assert "misnamed   8 PNG or JPEG files called the other, no fault\n" in inspected.out
    for number, what in enumerate(names):
        line = f"  {number // 8:05}/{number % 8:05}.jpg: it is neither a JPEG nor a PNG file but "
        assert f"{line}{what}\n" in inspected.out

    # A clip is read up to its first bad frame.
    flags = ["--train.steps", 30, "--data.max-bad-share", 1, "--data.frames", 2]
    assert cli(*train_flags(videos, tmp_path / "run", *flags)).code == 0
    text = (tmp_path / "run" / "bad_files.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len({line["file"] for line in lines}) == len(lines) > 8
    for line in lines:
        video, frame = Path(line["file"]).parts[-2:]
        what = names[8 * int(video) + int(Path(frame).stem)]
        assert line["message"].endswith(f"it is neither a JPEG nor a PNG file but {what}")
