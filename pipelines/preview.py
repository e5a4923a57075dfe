"""A picture of the clips that a training run sees, since augmentation is debugged by looking."""

import bisect
import contextlib
import os
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from smtc.config import Config, DataConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Batch, Source
from smtc.pipelines.clips import Schedule
from smtc.pipelines.loading import build_loader
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD

Pixels = NDArray[np.uint8]

MOST_CLIPS = 128
_LAST_STEP = 10**12
_WRITER = "smtc data preview"  # in the file, so that the next preview may replace it

_VIEWS = ("student", "teacher")
_COLOURS = ((0, 114, 178), (213, 94, 0))  # of the two views
_PAPER, _INK, _EMPTY = (250, 250, 248), (38, 40, 46), (208, 208, 204)
_LINE, _GAP, _LABELS = 20, 4, 72  # pixels: a line of text, between pictures, left of the rows
_WIDEST, _TALLEST = 2400, 3600  # of all frames together, above which they are drawn smaller
_SIDES = (32, 192)  # a drawn frame's longer side, least (whatever the sheet's size) and greatest


def preview(
    config: Config,
    output: str | Path = "preview.png",
    *,
    clips: int = 4,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> Path:
    """Write what a run of `config` sees in its step `step` (from 0): the first `clips` clips.

    The run's own loader makes them, on `device`. A file that an earlier preview wrote is replaced.
    Returns the file. `UserError`: another file is there, or none can be written; impossible
    numbers; what `build_loader` raises.
    """
    if not 1 <= clips <= MOST_CLIPS:
        raise UserError(f"--clips is {clips}; a picture shows 1 to {MOST_CLIPS}.")
    if not 0 <= step <= _LAST_STEP:
        raise UserError(f"--step is {step}; use 0 to {_LAST_STEP}.")
    if config.data.root is None:
        raise UserError("Which videos should be shown? Give smtc data preview FOLDER.")
    target = _checked(Path(output), config.data.root)
    on_gpu = torch.device(device).type == "cuda"
    loader = build_loader(
        config.data,
        Schedule(
            batch=clips,
            steps=step + 1,
            start_step=step,
            start_sample=step * config.train.batch,
        ),
        size=config.model.resolution,
        seed=config.train.seed,
        device=device,
        dtype=torch.bfloat16 if on_gpu and config.train.precision == "bf16" else torch.float32,
    )
    try:
        sheet = contact_sheet(next(iter(loader)))
    finally:
        loader.close()
    _save(sheet, target)
    return target


def contact_sheet(batch: Batch) -> Pixels:
    """A picture of a batch, RGB uint8 `[h,w,3]`: the student's frames above the teacher's.

    Where the views have their own crops, a map beside them puts the first frame of each back into
    the place that it shows. Views may be of any dtype and on any device.
    """
    clips, _, frames, _, *view = batch.views.shape
    maps = batch.spatial is not None
    columns = frames + 2 * maps
    height, width = _tile(view, columns, 2 * clips)
    titles = _LINE * (1 + maps)
    block = titles + 2 * (height + _GAP) + 2 * _GAP
    wide = _LABELS + columns * (width + _GAP) + _GAP
    sheet = Image.new("RGB", (max(wide, 640), clips * block + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for clip, source in enumerate(batch.sources):
        top = 2 * _GAP + clip * block
        _text(draw, (_GAP, top), _title(source, int(batch.index[clip])), sheet.width)
        pixels = _as_pixels(batch.views[clip])
        for view_number, row in enumerate(pixels):
            row_top = top + titles + view_number * (height + _GAP)
            place = (_GAP, row_top + (height - _LINE) // 2)
            _text(draw, place, _VIEWS[view_number], _LABELS, _COLOURS[view_number])
            for number, frame in enumerate(row):
                left = _LABELS + number * (width + _GAP)
                sheet.paste(Image.fromarray(_resized(frame, (height, width))), (left, row_top))
        if batch.spatial is not None:
            where = batch.spatial[clip].tolist()
            _text(draw, (_GAP, top + _LINE), _crops(where), sheet.width)
            size = 2 * height + _GAP, 2 * width + _GAP
            left = _LABELS + frames * (width + _GAP)
            sheet.paste(_map(pixels[:, 0], where, size), (left, top + titles))
    return np.array(sheet)


def augmentation(config: DataConfig) -> str:
    """One line that says which augmentations are on."""
    augment = config.augment
    parts = []
    if augment.crop is not None:
        parts.append("crop {:g} to {:g} of the area".format(*augment.crop))
    for name in ("flip", "grayscale"):
        if chance := getattr(augment, name):
            parts.append(f"{name} {chance:g}")
    if augment.jitter_chance:
        strengths = " ".join(f"{strength:g}" for strength in augment.jitter)
        parts.append(f"jitter {augment.jitter_chance:g} ({strengths})")
    if augment.blur:
        low, high = augment.blur_sigma
        parts.append(f"blur {augment.blur:g} (sigma {low:g} to {high:g})")
    if not parts:
        return "No augmentation is on."
    shared = "shared by the two views" if config.spatial == "shared" else "drawn for each view"
    places = f"; crop and flip are {shared}" if augment.crop or augment.flip else ""
    return f"Augmentation: {', '.join(parts)}{places}."


def _as_pixels(views: Tensor) -> Pixels:
    """Normalised views `[...,3,H,W]` as RGB uint8 `[...,H,W,3]`."""
    channels_last = views.detach().float().cpu().movedim(-3, -1)
    shown = channels_last * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    return (255 * shown.clamp(0, 1)).round().to(torch.uint8).numpy()


def _tile(view: list[int], columns: int, rows: int) -> tuple[int, int]:
    """Height and width at which frames of the size `view` are drawn."""
    height, width = view
    least, greatest = (side / max(view) for side in _SIDES)
    scale = max(min(greatest, _WIDEST / (columns * width), _TALLEST / (rows * height)), least)
    if scale > 1:
        scale = int(scale)  # every pixel as large as the next
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(frame: Pixels, size: tuple[int, int]) -> Pixels:
    """To `size` (height, width): enlarged pixel by pixel, made smaller by averages."""
    larger = size[0] >= frame.shape[0]
    mode = cv2.INTER_NEAREST if larger else cv2.INTER_AREA
    return cv2.resize(frame, size[::-1], interpolation=mode)  # type: ignore[return-value]


def _title(source: Source, index: int) -> str:
    return f"{source.video}   start {source.start}   gap {source.gap}   (sample {index})"


def _crops(where: list[list[float]]) -> str:
    texts = []
    for name, (x, y, width, height, flip) in zip(_VIEWS, where, strict=True):
        mirrored = ", mirrored" if flip else ""
        texts.append(f"{name}: x {x:.2f} y {y:.2f} size {width:.2f} by {height:.2f}{mirrored}")
    return "   ".join(texts)


def _map(views: Pixels, where: list[list[float]], size: tuple[int, int]) -> Image.Image:
    """Both views `[2,H,W,3]` in their places of the frame, drawn `size` (height, width) large."""
    canvas = Image.new("RGB", size[::-1], _EMPTY)
    outlines = []
    for number in (1, 0):  # the student's on top
        x, y, width, height, flip = where[number]
        left, right = (round(share * size[1]) for share in (x, x + width))
        top, bottom = (round(share * size[0]) for share in (y, y + height))
        picture = np.ascontiguousarray(views[number][:, ::-1]) if flip else views[number]
        extent = max(1, bottom - top), max(1, right - left)
        canvas.paste(Image.fromarray(_resized(picture, extent)), (left, top))
        box = (left, top, left + extent[1] - 1, top + extent[0] - 1)
        outlines.append((box, _COLOURS[number]))
    draw = ImageDraw.Draw(canvas)
    for box, colour in outlines:
        draw.rectangle(box, outline=colour, width=2)
    return canvas


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    right: int,
    colour: tuple[int, int, int] = _INK,
) -> None:
    """One line that ends before `right`, shortened where it is too long."""
    font = ImageFont.load_default(size=13)
    # A file's name may hold line breaks and bytes that are no text.
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").splitlines())
    room = right - place[0] - _GAP
    if draw.textlength(line, font) > room:
        fits = bisect.bisect_right(
            range(len(line)), float(room), key=lambda end: draw.textlength(line[:end] + "…", font)
        )
        line = line[: max(0, fits - 1)] + "…"
    draw.text(place, line, fill=colour, font=font)


def _checked(output: Path, root: str) -> Path:
    """The file to write, links followed, if it may be written."""
    target = Path(os.path.realpath(output))
    if target.suffix.lower() != ".png":
        raise UserError(f"The picture {output} will be a PNG; choose a name that ends in .png.")
    if target.is_relative_to(Path(root).resolve()):
        raise UserError(
            f"{output} lies inside the data folder {root}, where it would pass for a frame; "
            "choose another place with --output."
        )
    if os.path.exists(target) and not _is_ours(target):
        raise UserError(
            f"{output} is there already and no earlier preview; choose another name with --output."
        )
    return target


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _WRITER
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _save(sheet: Pixels, target: Path) -> None:
    partial = target.with_name(f".{target.name}.smtc-partial")
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Software", _WRITER)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(partial, format="PNG", pnginfo=notes)
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); choose another --output."
        ) from error
