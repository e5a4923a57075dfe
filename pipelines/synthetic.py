"""Videos of textured moving objects with exact masks, written in the DAVIS layout.

Every video draws two colours that its background and all its objects share, so colour does not
separate them: texture and motion do. A category is a kind of texture; objects with the same kind of
texture are instances of one category.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.folders import whole_folder
from smtc.pipelines.images import write_ids
from smtc.progress import track

VERSION = 2
CATEGORIES = ("horizontal stripes", "vertical stripes", "checker", "dots")
"""Names of the category ids 1, 2, 3, 4."""

_KINDS = ("JPEGImages", "Annotations", "Categories")
_COVERED = 0.25  # share of the pixels under objects
# Halving the colour's resolution, the usual default, would wash out textures of five pixels.
_JPEG = (
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
_COLOUR_DISTANCE, _COLOUR_JITTER, _NOISE = 0.6, 0.03, 0.03  # RGB in [0, 1]
_CANDIDATES = 512  # trajectories drawn to find one with the separation wanted
_LARGEST = 8192  # pixels on a side


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What sets a level apart; lengths in pixels, speeds in pixels a frame."""

    objects: tuple[int, int]
    """Fewest and most objects of a video."""
    instances: int
    """Objects of one category."""
    separation: tuple[float, float]
    """Bounds of the least distance of two centres over the sum of the outer radii."""
    camera: float
    """Greatest speed of the background."""
    light: float = 0.0
    """Relative amplitude of the changing gain, and of the gradient across the frame."""


DIFFICULTIES = {
    "standard": Difficulty(objects=(2, 3), instances=1, separation=(1.0, math.inf), camera=1.5),
    "instances": Difficulty(objects=(3, 4), instances=2, separation=(0.4, 0.8), camera=1.5),
    "hard": Difficulty(objects=(4, 6), instances=2, separation=(0.4, 0.8), camera=4.0, light=0.3),
}


@dataclass(frozen=True)
class _Shapes:
    """The superellipses |x/a|^n + |y/b|^n <= 1 of K objects, turned by `angle` (radians)."""

    axes: NDArray[np.float64]  # [K,2]
    exponent: NDArray[np.float64]  # [K]
    angle: NDArray[np.float64]  # [K]

    @property
    def radius(self) -> NDArray[np.float64]:
        """Outer radii `[K]`: the largest x² + y² on each outline, by Lagrange's rule."""
        power = 2 * self.exponent / (self.exponent - 2)
        longest = self.axes.max(axis=1)
        return longest * ((self.axes / longest[:, None]) ** power[:, None]).sum(1) ** (1 / power)


def render_video(
    seed: int, index: int, *, frames: int = 8, size: int = 96, difficulty: str = "standard"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Video `index` of the set of `seed`: a pure function of its arguments.

    Returns RGB frames `[F,H,W,3]`, instance ids `[F,H,W]` and category ids `[F,H,W]`, all uint8, 0
    for background; of two objects that overlap, the one with the higher instance id is in front. An
    unknown difficulty is a `UserError`.
    """
    level = _level(difficulty)
    rng = np.random.default_rng([seed, index])
    count = int(rng.integers(level.objects[0], level.objects[1] + 1))
    kinds = rng.permutation(len(CATEGORIES))[np.arange(count) // level.instances]
    kinds = rng.permutation(kinds)
    colours = _two_colours(rng)
    shapes = _draw_shapes(rng, count, size)
    centres = _draw_centres(rng, shapes.radius, frames, size, level.separation)

    y, x = np.mgrid[:size, :size].astype(np.float32)
    instances = np.zeros((frames, size, size), np.uint8)
    categories = np.zeros_like(instances)
    mixing, region = _background(rng, frames, x, y, level.camera), _jittered(rng, colours)
    pixels = _mix(mixing, region)
    for k in range(count):
        dx = x - centres[k, :, 0, None, None].astype(np.float32)  # [F,H,W]
        dy = y - centres[k, :, 1, None, None].astype(np.float32)
        inside = _inside(dx, dy, shapes.axes[k], shapes.exponent[k], shapes.angle[k])
        mixing, region = (
            _texture(rng, int(kinds[k]), dx[inside], dy[inside]),
            _jittered(rng, colours),
        )
        pixels[inside] = _mix(mixing, region)
        instances[inside] = k + 1
        categories[inside] = kinds[k] + 1
    if level.light:
        pixels *= _light(rng, frames, size, level.light)
    pixels += rng.normal(0, _NOISE, pixels.shape).astype(np.float32)
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8), instances, categories


def synthesize(
    root: str | Path,
    *,
    videos: int = 256,
    frames: int = 8,
    size: int = 96,
    seed: int = 0,
    difficulty: str = "standard",
) -> Path:
    """Write a set of videos in the DAVIS layout and return its folder.

    `JPEGImages/480p/<video>/%05d.jpg`, instance ids in `Annotations/480p/<video>/%05d.png`,
    category ids in `Categories/480p/<video>/%05d.png` (palette PNGs, 0 is background) and
    `synthetic.json`, which says how it was made. The folder appears under its name only when it
    is whole. The same set already there is left as it is; a folder that holds anything else, or a
    setting out of range, is a `UserError`.
    """
    _level(difficulty)
    for name, value, least in (("videos", videos, 1), ("frames", frames, 1), ("size", size, 16)):
        if value < least:
            raise UserError(f"{name} is {value}; a synthetic set needs at least {least}.")
    if size > _LARGEST:
        raise UserError(f"size is {size}; use at most {_LARGEST}.")
    if seed < 0:
        raise UserError(f"seed is {seed}; use 0 or more.")
    root = Path(root).absolute()
    described = {
        "version": VERSION,
        "seed": seed,
        "difficulty": difficulty,
        "videos": videos,
        "frames": frames,
        "size": size,
        "categories": list(CATEGORIES),
    }
    if _already_there(root, described):
        return root
    with whole_folder(root, ()) as partial:
        _write_all(partial, videos, frames, size, seed, difficulty)
        (partial / "synthetic.json").write_text(json.dumps(described, indent=2) + "\n")
    return root


def _level(difficulty: str) -> Difficulty:
    if difficulty not in DIFFICULTIES:
        raise UserError(
            f"There is no difficulty {difficulty!r}; choose from {', '.join(DIFFICULTIES)}."
        )
    return DIFFICULTIES[difficulty]


def _already_there(root: Path, described: dict[str, object]) -> bool:
    """Whether `root` holds exactly this set; anything else in it is a `UserError`."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "synthetic.json").read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{root} already holds something else; choose another folder.")
    for name, value in described.items():
        if found.get(name) != value:
            raise UserError(
                f"{root} holds a synthetic set with {name} {found.get(name)} instead of {value}; "
                "delete it or choose another folder."
            )
    return True


def _write_all(root: Path, videos: int, frames: int, size: int, seed: int, difficulty: str) -> None:
    def write(index: int) -> None:
        arrays = render_video(seed, index, frames=frames, size=size, difficulty=difficulty)
        folders = [root / kind / "480p" / f"{index:05d}" for kind in _KINDS]
        for folder in folders:
            folder.mkdir(parents=True)
        for number, (image, instances, categories) in enumerate(zip(*arrays, strict=True)):
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            data = cv2.imencode(".jpg", bgr, _JPEG)[1]
            (folders[0] / f"{number:05d}.jpg").write_bytes(data.tobytes())
            write_ids(folders[1] / f"{number:05d}.png", instances)
            write_ids(folders[2] / f"{number:05d}.png", categories)

    # Threads: NumPy and OpenCV work on whole arrays, without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in track(
            pool.map(write, range(videos)), total=videos, title="synthesize", unit="video"
        ):
            pass


def _two_colours(rng: np.random.Generator) -> NDArray[np.float64]:
    """Two RGB colours `[2,3]` that are easily told apart."""
    while True:
        colours = rng.uniform(0, 1, (2, 3))
        if np.linalg.norm(colours[0] - colours[1]) > _COLOUR_DISTANCE:
            return colours


def _jittered(rng: np.random.Generator, colours: NDArray[np.float64]) -> NDArray[np.float32]:
    return (colours + rng.normal(0, _COLOUR_JITTER, colours.shape)).astype(np.float32)


def _mix(mixing: NDArray[np.float32], colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours `[...,3]` on the way from the first (-1) to the second (+1)."""
    share = (0.5 + 0.5 * mixing)[..., None]
    return colours[0] + share * (colours[1] - colours[0])


def _draw_shapes(rng: np.random.Generator, count: int, size: int) -> _Shapes:
    """Objects that cover the wanted share of the frame together, if none overlaps."""
    weights = rng.uniform(0.8, 1.2, count)
    area = _COVERED * rng.uniform(0.9, 1.1) * size**2 * weights / weights.sum()
    exponent = rng.uniform(2.2, 4.0, count)
    aspect = rng.uniform(0.75, 1.0, count)
    unit = np.array([4 * math.gamma(1 + 1 / n) ** 2 / math.gamma(1 + 2 / n) for n in exponent])
    longer = np.sqrt(area / (unit * aspect))
    axes = np.stack([longer, longer * aspect], axis=1)
    return _Shapes(axes, exponent, rng.uniform(0, np.pi, count))


def _draw_centres(
    rng: np.random.Generator,
    radius: NDArray[np.float64],
    frames: int,
    size: int,
    separation: tuple[float, float],
) -> NDArray[np.float64]:
    """Centres (x, y) `[K,F,2]` that bounce inside the frame, with the separation wanted.

    The first of many draws that has it, or else the one that misses it least.
    """
    count = len(radius)
    margin = np.minimum(radius, 0.4 * size)[:, None, None]  # [K,1,1]
    span = size - 1 - 2 * margin
    start = rng.uniform(0, 1, (_CANDIDATES, count, 1, 2)) * span
    speed = rng.uniform(1.5, 3.5, (_CANDIDATES, count, 1, 1))
    heading = rng.uniform(0, 2 * np.pi, (_CANDIDATES, count, 1, 1))
    velocity = speed * np.concatenate([np.cos(heading), np.sin(heading)], axis=-1)
    travelled = (start + velocity * np.arange(frames)[:, None]) % (2 * span)
    centres = margin + span - np.abs(travelled - span)  # [candidates,K,F,2]

    first, second = np.triu_indices(count, 1)
    distance = np.linalg.norm(centres[:, first] - centres[:, second], axis=-1)
    least = (distance / (radius[first] + radius[second])[:, None]).min(axis=(1, 2))
    low, high = separation
    missed = np.maximum(low - least, 0) + np.maximum(least - high, 0)
    return centres[int(missed.argmin())]


def _inside(
    dx: NDArray[np.float32],
    dy: NDArray[np.float32],
    axes: NDArray[np.float64],
    exponent: float,
    angle: float,
) -> NDArray[np.bool_]:
    """Which of the pixels at (dx, dy) from the centre lie in the superellipse."""
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    along = np.abs(cos * dx + sin * dy) / np.float32(axes[0])
    across = np.abs(cos * dy - sin * dx) / np.float32(axes[1])
    return along ** np.float32(exponent) + across ** np.float32(exponent) <= 1


def _background(
    rng: np.random.Generator,
    frames: int,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    camera: float,
) -> NDArray[np.float32]:
    """Ten plane waves that pan with the camera, in [-1, 1], `[F,H,W]`."""
    waves = 10
    heading, pan = rng.uniform(0, 2 * np.pi, waves), rng.uniform(0, 2 * np.pi)
    wavenumber = 2 * np.pi / rng.uniform(6, 14, waves)
    phase = rng.uniform(0, 2 * np.pi, waves)
    speed = rng.uniform(0, camera)
    total = np.zeros((frames, *x.shape), np.float32)
    for w in range(waves):
        kx, ky = wavenumber[w] * math.cos(heading[w]), wavenumber[w] * math.sin(heading[w])
        shift = phase[w] - speed * (kx * math.cos(pan) + ky * math.sin(pan)) * np.arange(frames)
        total += np.sin(
            np.float32(kx) * x + np.float32(ky) * y + shift[:, None, None].astype(np.float32)
        )
    return _saturated(total / np.sqrt(waves / 2, dtype=np.float32))


def _texture(
    rng: np.random.Generator, kind: int, dx: NDArray[np.float32], dy: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The texture of category `kind` + 1 in [-1, 1], at offsets from the object's centre."""
    wavenumber = 2 * np.pi / rng.uniform(4.5, 6.5)
    tilt = rng.uniform(-0.15, 0.15)
    cos, sin = np.float32(wavenumber * math.cos(tilt)), np.float32(wavenumber * math.sin(tilt))
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    u = np.cos(cos * dx + sin * dy + phase[0])
    v = np.cos(cos * dy - sin * dx + phase[1])
    # Scaled to unit variance, so that all textures mix the two colours alike.
    waves = (math.sqrt(2) * v, math.sqrt(2) * u, 2 * u * v, u + v - 0.7)[kind]
    flip = rng.choice(np.array([-1, 1], np.float32))
    return flip * _saturated(waves)


def _saturated(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """A unit-variance wave with flat crests: mostly one colour or the other."""
    return np.tanh(np.float32(1.5) * wave)


def _light(
    rng: np.random.Generator, frames: int, size: int, strength: float
) -> NDArray[np.float32]:
    """Factors `[F,H,W,1]`: a gain that changes over time and a gradient that changes and turns."""
    t = np.arange(frames)
    gain = strength * np.sin(rng.uniform(0.2, 0.6) * t + rng.uniform(0, 2 * np.pi))
    slope = strength * np.sin(rng.uniform(0.1, 0.4) * t + rng.uniform(0, 2 * np.pi))
    angle = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.2, 0.2) * t
    along = np.linspace(-1, 1, size)
    gradient = np.cos(angle)[:, None, None] * along + np.sin(angle)[:, None, None] * along[:, None]
    factor = (1 + gain[:, None, None]) * (1 + slope[:, None, None] * gradient / math.sqrt(2))
    return factor[..., None].astype(np.float32)
