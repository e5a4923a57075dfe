"""Pictures: coloured label maps, overlays, contact sheets and the report of a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from smtc.pipelines.images import mask_palette

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
Curve = Sequence[tuple[float, float]]

PAPER, INK, FAINT = (250, 250, 248), (38, 40, 46), (222, 222, 218)
_BACKGROUND = (46, 49, 58)
# Told apart by most people with colour-deficient sight; after Okabe and Ito, then lighter and
# darker kin.
_HUES = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#9467BD"),
    *("#A6D854", "#FFB3A7", "#8C6D31", "#B3E2F5", "#E7298A", "#66A61E", "#7570B3", "#17BECF"),
)


def davis_palette() -> Pixels:
    """The RGB colours `[256,3]` of palette masks (PASCAL VOC, DAVIS); id 0 is black."""
    return np.frombuffer(mask_palette(), np.uint8).reshape(256, 3)


def plain_palette(background: int | None = None) -> Pixels:
    """RGB colours `[256,3]` that are easily told apart, 16 in turn; `background` is dark grey."""
    hues = np.array([[int(hue[i : i + 2], 16) for i in (1, 3, 5)] for hue in _HUES], np.uint8)
    colours = np.resize(hues, (256, 3))
    if background is not None:
        colours[background] = _BACKGROUND
    return colours


def object_palette() -> Pixels:
    """RGB colours `[256,3]` for instance ids: 0 dark grey, 1, 2, … as `plain_palette`."""
    return np.concatenate([np.array([_BACKGROUND], np.uint8), plain_palette()[:-1]])


def colour_labels(labels: NDArray[np.integer], palette: Pixels) -> Pixels:
    """Integer labels `[...,h,w]` as RGB uint8 `[...,h,w,3]`; beyond 255 colours come again."""
    return palette[labels if labels.dtype == np.uint8 else labels % len(palette)]


def overlay(frame: Pixels, mask: NDArray[np.integer], *, opacity: float = 0.5) -> Pixels:
    """A frame (RGB uint8 `[h,w,3]`) tinted by instance ids `[h,w]` and outlined; 0 stays clear."""
    colours = colour_labels(mask, object_palette())
    inside = mask[..., None] > 0
    tinted = np.where(inside, cv2.addWeighted(frame, 1 - opacity, colours, opacity, 0), frame)
    ids = mask.astype(np.uint8)
    square = np.ones((3, 3), np.uint8)
    edge = (cv2.dilate(ids, square) != cv2.erode(ids, square))[..., None] & inside
    return np.where(edge, colours, tinted)


def contact_sheet(
    rows: Sequence[Sequence[Pixels]],
    columns: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    tile: int = 192,
) -> Pixels:
    """A table of pictures under column titles, RGB uint8.

    Args:
        rows: pictures (RGB uint8 `[h,w,3]`), as many a row as `columns`; drawn `tile` pixels high.
        names: written under each row.
    """
    gap, head, foot = tile // 15, round(tile * 0.19), round(tile * 0.15) if names else 0
    pictures = [[_to_height(picture, tile) for picture in row] for row in rows]
    widths = [max(row[c].shape[1] for row in pictures) for c in range(len(columns))]
    size = (
        sum(widths) + gap * (len(columns) + 1),
        head + len(rows) * (tile + foot + gap) + (0 if names else gap),
    )
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = gap + np.concatenate([[0], np.cumsum(np.array(widths) + gap)])
    for title, left, width in zip(columns, lefts, widths, strict=False):
        _text(draw, (left + width / 2, head / 2), title, round(tile * 0.085), "mm")
    for r, row in enumerate(pictures):
        top = head + r * (tile + foot + gap)
        for picture, left in zip(row, lefts, strict=False):
            canvas.paste(Image.fromarray(picture), (int(left), top))
        if names:
            place = (gap, top + tile + foot / 2)
            _text(draw, place, names[r], round(tile * 0.075), "lm", faint=True)
    return np.asarray(canvas)


def _to_height(picture: Pixels, height: int) -> Pixels:
    """Enlarged pixel by pixel, made smaller by averages."""
    size = (max(1, round(picture.shape[1] * height / picture.shape[0])), height)
    larger = height >= picture.shape[0]
    return cv2.resize(
        picture, size, interpolation=cv2.INTER_NEAREST if larger else cv2.INTER_AREA
    ).astype(np.uint8)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    anchor: str,
    *,
    faint: bool = False,
) -> None:
    font = ImageFont.load_default(size=max(size, 9))
    draw.text(place, text, fill=(120, 122, 128) if faint else INK, font=font, anchor=anchor)


def plot_curves(curves: Mapping[str, Curve], *, size: tuple[int, int], title: str) -> Pixels:
    """Lines over steps with axes and a legend, RGB uint8; `size` is (width, height).

    A curve is (step, value) pairs; values that are not finite are left out.
    """
    scale = 3  # drawn larger and averaged, since PIL's lines are not smooth
    width, height = (side * scale for side in size)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    unit = scale * 13
    box = (4.2 * unit, 2.6 * unit, width - 1.2 * unit, height - 2.6 * unit)
    kept = {name: _finite(curve) for name, curve in curves.items()}
    kept = {name: points for name, points in kept.items() if len(points)}
    _text(draw, (box[0], 1.2 * unit), title, round(1.15 * unit), "lm")
    if not kept:
        _text(draw, (width / 2, height / 2), "no losses logged", unit, "mm", faint=True)
        return _shrunk(canvas, size)
    everything = np.concatenate(list(kept.values()))
    low, high = _axes(draw, everything, box, unit)
    right = box[2]
    for index, (name, points) in reversed(list(enumerate(kept.items()))):
        colour = tuple(int(c) for c in plain_palette()[(4, 0, 2, 6, 5, 1, 3)[index % 7]])
        share = (points - low) / (high - low)
        xs = box[0] + share[:, 0] * (box[2] - box[0])
        ys = box[3] - share[:, 1] * (box[3] - box[1])
        path = list(zip(xs.tolist(), ys.tolist(), strict=True))
        if len(path) > 1:
            draw.line(path, fill=colour, width=2 * scale, joint="curve")
        else:
            draw.circle(path[0], 3 * scale, fill=colour)
        _text(draw, (right, 1.2 * unit), name, unit, "rm")
        right -= draw.textlength(name, ImageFont.load_default(size=unit)) + 0.5 * unit
        draw.line([(right - 1.5 * unit, 1.2 * unit), (right, 1.2 * unit)], colour, 3 * scale)
        right -= 2.6 * unit
    return _shrunk(canvas, size)


def _finite(curve: Curve) -> NDArray[np.float64]:
    points = np.asarray(curve, np.float64).reshape(-1, 2)
    return points[np.isfinite(points).all(1)]


def _shrunk(canvas: Image.Image, size: tuple[int, int]) -> Pixels:
    return np.asarray(canvas.resize(size, Image.Resampling.BOX))


def _axes(
    draw: ImageDraw.ImageDraw,
    points: NDArray[np.float64],
    box: tuple[float, float, float, float],
    unit: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw grid lines with round numbers; returns the plot's least and greatest (step, value)."""
    ticks = [_round_ticks(points[:, axis].min(), points[:, axis].max()) for axis in (0, 1)]
    low = np.array([points[:, 0].min(), ticks[1][0]])
    high = np.array([max(points[:, 0].max(), low[0] + 1), ticks[1][-1]])
    for value in ticks[1]:
        y = box[3] - (value - low[1]) / (high[1] - low[1]) * (box[3] - box[1])
        draw.line([(box[0], y), (box[2], y)], FAINT, max(1, unit // 13))
        _text(draw, (box[0] - 0.5 * unit, y), f"{value:g}", unit, "rm", faint=True)
    for value in ticks[0]:
        if low[0] <= value <= high[0]:
            x = box[0] + (value - low[0]) / (high[0] - low[0]) * (box[2] - box[0])
            _text(draw, (x, box[3] + unit), f"{value:g}", unit, "mm", faint=True)
    return low, high


def _round_ticks(low: float, high: float) -> NDArray[np.float64]:
    """About five multiples of 1, 2 or 5 times a power of ten that enclose `low` and `high`."""
    span = max(high - low, 1e-6 * max(abs(low), 1.0))
    power = 10.0 ** np.floor(np.log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * 5 >= span)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return np.round(np.arange(first, max(last, first + 1) + 1) * step, 12)


@dataclass(frozen=True)
class Sample:
    """A frame and what a model sees in it."""

    name: str
    frame: Pixels
    """RGB uint8 `[h,w,3]`."""
    semantic: NDArray[np.integer]
    """Semantic slots `[h,w]`."""
    instance: NDArray[np.integer]
    """Instance ids `[h,w]`, 0 is background."""
    truth: NDArray[np.integer]
    """True ids `[h,w]`, 0 is background."""
    background: int | None = None
    """The semantic slot to be drawn dark."""


def sample_sheet(samples: Sequence[Sample]) -> Pixels:
    """A contact sheet, a row a sample: frame, semantic map, instance map, ground truth."""
    objects = object_palette()
    rows = [
        [
            sample.frame,
            colour_labels(sample.semantic, plain_palette(sample.background)),
            colour_labels(sample.instance, objects),
            colour_labels(sample.truth, objects),
        ]
        for sample in samples
    ]
    columns = ("frame", "semantic map", "instance map", "ground truth")
    return contact_sheet(rows, columns, names=[sample.name for sample in samples])


def clip_sheet(
    frames: Sequence[Pixels],
    semantic: Sequence[NDArray[np.integer]],
    instance: Sequence[NDArray[np.integer]],
    *,
    background: int | None = None,
) -> Pixels:
    """A contact sheet of one clip, a column a frame: frames (RGB uint8 `[h,w,3]`), semantic maps
    and instance maps (`[h,w]`, 0 dark); the semantic slot `background` is dark too.
    """
    plain, objects = plain_palette(background), object_palette()
    rows = [
        frames,
        [colour_labels(labels, plain) for labels in semantic],
        [colour_labels(labels, objects) for labels in instance],
    ]
    columns = [f"frame {number + 1}" for number in range(len(frames))]
    return contact_sheet(rows, columns, names=["frames", "semantic map", "instance map"])


def training_report(
    path: str | Path, samples: Sequence[Sample], losses: Mapping[str, Curve]
) -> Path:
    """One picture of a run: what the model sees in held-out frames, and its loss curves (PNG).

    `losses` maps a loss's name to (step, value) pairs.
    """
    sheet = sample_sheet(samples)
    curves = plot_curves(losses, size=(sheet.shape[1], 260), title="loss by training step")
    return save_picture(path, np.concatenate([sheet, curves]))


def save_picture(path: str | Path, picture: Pixels) -> Path:
    """Write RGB uint8 `[h,w,3]` as PNG, under its name only when it is whole."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(picture).save(partial, format="PNG")
    partial.replace(path)
    return path
