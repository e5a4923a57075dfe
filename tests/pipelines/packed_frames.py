"""Pictures to be packed, and what `smtc data pack` made of them."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from smtc.pipelines.cache import Shard, read_index
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import read_image
from smtc.pipelines.views import resize_frame


def write(root: Path, name: str, *frames: np.ndarray, suffix: str = ".png") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{number:03d}{suffix}"), frame)
    return folder


def noise(*shape: int, kind: Any = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, kind)


def index_of(folder: Path) -> dict[str, Shard]:
    index = read_index(folder / "packed")
    assert index is not None
    return {shard.video: shard for shard in index[1]}


def array_of(folder: Path, video: str) -> np.ndarray:
    return np.load(folder / "packed" / index_of(folder)[video].file, mmap_mode="r")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What shows that a file was written anew."""
    seen = {path.name: path.stat() for path in (folder / "packed").glob("*.npy")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in seen.items()}


def expect_whole(root: Path, folder: Path, size: int = 16) -> None:
    """Every frame of every video is there, and nothing else."""
    index = index_of(folder)
    assert set(index) == {video.name for video in find_videos(root)}
    assert set(os.listdir(folder / "packed")) == {"index.json", *(s.file for s in index.values())}
    for video in find_videos(root):
        expected = [resize_frame(read_image(frame), (size, size)) for frame in video.frames]
        np.testing.assert_array_equal(array_of(folder, video.name), expected)
