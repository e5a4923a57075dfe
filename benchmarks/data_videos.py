"""What `smtc bench data` reads: videos written for it, or a few of somebody's, copied."""

import shutil
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.clips import Video, find_videos

VIDEOS, FRAMES = 8, 24
"""Of a written folder; of a given one at most so many videos and twice as many frames of each."""
QUALITY = 90
# Cell size in pixels and amplitude: large shapes, and texture for JPEG to work on.
_OCTAVES = ((256, 40.0), (64, 14.0), (16, 8.0), (5, 5.0))
_GRAIN = 1.5
_PAN = 64


def write_videos(folder: Path, height: int, width: int) -> None:
    """JPEG frames like footage: a texture that pans behind moving ellipses, under mild grain.

    At 720p a frame has about 145 KB, at 480p 65 KB, as much as one of DAVIS.
    """
    for number in range(VIDEOS):
        video = folder / f"{number:02}"
        video.mkdir(parents=True)
        for position, frame in enumerate(_film(number, height, width)):
            options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
            cv2.imwrite(str(video / f"{position:05}.jpg"), frame, options)


def _film(seed: int, height: int, width: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    scene = np.full((height + _PAN, width + _PAN, 3), rng.uniform(90, 160, 3), np.float32)
    for cell, amplitude in _OCTAVES:
        knots = rng.normal(size=(height // cell + 3, width // cell + 3, 3)).astype(np.float32)
        smooth = cv2.resize(knots, scene.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        scene += amplitude * smooth
    places = rng.uniform(0, 1, (8, 2)) * (width, height)
    speeds, radii = rng.uniform(-6, 6, (8, 2)), rng.uniform(0.03, 0.12, 8) * width
    colours = rng.uniform(20, 235, (8, 3))
    frames = []
    for time in range(FRAMES):
        pan = time % _PAN
        frame = scene[pan : pan + height, pan : pan + width].copy()
        for place, radius, colour in zip(places + time * speeds, radii, colours, strict=True):
            axes = (int(radius), int(0.6 * radius))
            centre = (int(place[0]), int(place[1]))
            cv2.ellipse(frame, centre, axes, 10 * time, 0, 360, colour.tolist(), -1, cv2.LINE_AA)
        frame += _GRAIN * rng.standard_normal((height, width, 1), np.float32)
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return frames


def usable_videos(source: Path) -> list[Video]:
    """The first videos of `source` that are folders of frames; none are a `UserError`."""
    videos = [video for video in find_videos(source) if video.container is None]
    if not videos:
        raise UserError(f"{source} holds video files only; --data wants folders of frames.")
    return videos[:VIDEOS]


def copy_videos(source: Path, folder: Path) -> None:
    """The first frames of the usable videos of `source`."""
    for video in usable_videos(source):
        (folder / video.name).mkdir(parents=True)
        for frame in video.frames[: 2 * FRAMES]:
            shutil.copyfile(frame, folder / video.name / Path(frame).name)


def bytes_per_frame(folder: Path) -> int:
    """The mean size of the frame files of the videos in `folder`."""
    sizes = [Path(frame).stat().st_size for video in find_videos(folder) for frame in video.frames]
    return sum(sizes) // len(sizes)
