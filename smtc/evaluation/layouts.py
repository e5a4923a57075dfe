"""Where each data set keeps its frames and masks, and how its masks become ids."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from smtc.errors import UserError
from smtc.evaluation.videos import (
    EvaluationVideo,
    Pixels,
    read_grey,
    read_mask,
    size_text,
)
from smtc.pipelines.images import FRAME_SUFFIXES, BadFrame

VOID = 255
MOST_OBJECTS = 20  # DAVIS-2017 numbers its objects from 1 and has fewer in every video

_DAVIS_LISTS = ("ImageSets/2016/val.txt", "ImageSets/480p/val.txt", "480p/val.txt")
_SEGTRACK_MASK = 127  # masks are grey or RGB pictures of 0 and 255 with some grey at their edges
_FBMS_THRESHOLDS = {"marple7": 0.05, "marple2": 0.4}
_FBMS_THRESHOLD = 0.1
_FBMS_SUFFIXES = (".ppm", ".pgm", ".png", ".jpg", ".jpeg")  # originals before copies made of them


@dataclass(frozen=True)
class Layout:
    """A data set on disk."""

    folders: tuple[str, ...]
    """What its root must hold."""
    open: Callable[[Path], list[EvaluationVideo]]


def open_synthetic(root: Path) -> list[EvaluationVideo]:
    """Videos as `smtc data synthesize` writes them."""
    names = subfolders(root / "JPEGImages/480p")
    return [_davis_video(root, name, "Annotations", categories=True) for name in names]


def open_davis2016(root: Path) -> list[EvaluationVideo]:
    """The listed sequences, all without a list. Masks are 0/255, 0/1 or DAVIS-2017's with ids."""
    names = _listed(root, _DAVIS_LISTS) or subfolders(root / "JPEGImages/480p")
    return [_davis_video(root, name, "Annotations") for name in sorted(names)]


def open_davis2017_unsupervised(root: Path) -> list[EvaluationVideo]:
    """The validation sequences, with ids from 1 and void 255."""
    listed = "ImageSets/2017/val.txt"
    names = _listed(root, (listed,))
    if not names:
        raise UserError(
            f"There is no list {root / listed}; write the sequences to score into it, one a line."
        )
    videos = [_davis_video(root, name, "Annotations_unsupervised") for name in sorted(names)]
    return [
        replace(video, read=partial(_read_davis2017, first=video.annotations[0]))
        for video in videos
    ]


def _davis_video(
    root: Path,
    name: str,
    masks: str,
    *,
    categories: bool = False,
) -> EvaluationVideo:
    frames = files(root / "JPEGImages/480p" / name, FRAME_SUFFIXES, "frames")
    annotations = _masks(root / masks / "480p" / name, frames)
    kinds = None
    if categories and (root / "Categories").is_dir():
        kinds = [path for (path,) in _masks(root / "Categories/480p" / name, frames)]
    return EvaluationVideo(name, frames, [*annotations], kinds)


def _read_davis2017(paths: Sequence[Path], *, first: Sequence[Path] | None) -> Pixels:
    ids = read_mask(paths[0])
    beyond = ids[(ids > MOST_OBJECTS) & (ids != VOID)]
    if beyond.size:
        raise BadFrame(
            paths[0],
            f"it holds the id {beyond.max()}, but DAVIS-2017 has objects 1 to {MOST_OBJECTS} and "
            f"void {VOID}; use the original palette PNGs of Annotations_unsupervised",
        )
    if paths == first and not np.any((ids > 0) & (ids != VOID)):
        raise BadFrame(
            paths[0],
            "it shows no object, but a video's first mask defines those that are scored; use the "
            "original palette PNGs of Annotations_unsupervised",
        )
    return ids


def open_segtrackv2(root: Path, *, penguin: bool = False) -> list[EvaluationVideo]:
    """All sequences. The objects of one, a folder each, are merged to foreground.

    The sequence `penguin` is special: of its six objects only the first counts, unless `penguin`.
    """
    videos = []
    for name in subfolders(root / "JPEGImages"):
        frames = files(root / "JPEGImages" / name, (*FRAME_SUFFIXES, ".bmp"), "frames")
        objects = _object_folders(root / "GroundTruth" / name)
        if name == "penguin" and not penguin:
            objects = objects[:1]
        each = [_masks(folder, frames, (".png", ".bmp")) for folder in objects]
        merged = [tuple(path for paths in one for path in paths) for one in zip(*each, strict=True)]
        videos.append(EvaluationVideo(name, frames, [*merged], None, _read_segtrack))
    return videos


def _object_folders(folder: Path) -> list[Path]:
    """The subfolders `1`, `2`, … of a sequence's masks, or the folder itself where it has none."""
    if not folder.is_dir():
        return [folder]
    inner = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(inner, key=lambda path: int(path.name)) or [folder]


def _read_segtrack(paths: Sequence[Path]) -> Pixels:
    masks = [read_grey(path) > _SEGTRACK_MASK for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            size, first = size_text(mask.shape), size_text(masks[0].shape)
            raise BadFrame(
                path,
                f"the mask's size {size} is not that of the frame's first object, {first}; use "
                "masks of one resolution",
            )
    return np.any(masks, axis=0).astype(np.uint8)


def open_fbms59(root: Path) -> list[EvaluationVideo]:
    """The test videos, of which some frames have a mask; all objects are foreground."""
    return [_fbms_video(root / "Testset" / name) for name in subfolders(root / "Testset")]


def _fbms_video(folder: Path) -> EvaluationVideo:
    frames = files(folder, FRAME_SUFFIXES[:2], "frames")
    frames.sort(key=lambda path: (_number(path.stem), path.name))
    masks = files(folder / "GroundTruth", _FBMS_SUFFIXES, "masks")
    # Where a picture of probabilities stands beside a mask it is no truth.
    masks = [path for path in masks if "PROB" not in path.stem.upper()]
    masks.sort(key=lambda path: _FBMS_SUFFIXES.index(path.suffix.lower()))
    by_name = {path.stem: index for index, path in enumerate(frames)}
    by_number = {_number(path.stem): index for index, path in enumerate(frames)}
    by_number.pop(-1, None)
    annotations: list[tuple[Path, ...] | None] = [None] * len(frames)
    for path in masks:
        index = by_name.get(path.stem, by_number.get(_number(path.stem)))
        if index is None:
            raise UserError(
                f"{path} belongs to no frame of {folder}; complete the copy of FBMS-59."
            )
        annotations[index] = annotations[index] or (path,)
    threshold = 255 * _FBMS_THRESHOLDS.get(folder.name, _FBMS_THRESHOLD)
    read = partial(_read_fbms, threshold=threshold)
    return EvaluationVideo(folder.name, frames, annotations, None, read)


def _number(stem: str) -> int:
    """The last number of a file's name, which counts its frames; -1 without any."""
    numbers = re.findall(r"\d+", stem)
    return int(numbers[-1]) if numbers else -1


def _read_fbms(paths: Sequence[Path], *, threshold: float) -> Pixels:
    grey = read_grey(paths[0])
    found = grey > threshold
    if paths[0].suffix.lower() == ".ppm":
        found &= grey <= 0.99 * 255  # the newer videos' colour-coded masks: white is background
    return found.astype(np.uint8)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; `UserError` without any."""
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"
    )
    if not names:
        raise UserError(f"{folder} holds no videos; each should be a folder of frames.")
    return names


def _listed(root: Path, places: Sequence[str]) -> list[str]:
    """The sequences of the first list there is, by name or as pairs of files; [] without a list."""
    for place in places:
        path = root / place
        if not path.is_file():
            continue
        # A line is `<video>` or `/JPEGImages/480p/<video>/<frame>.jpg /Annotations/…`.
        entries = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        names = {Path(entry).parent.name if "/" in entry else entry for entry in entries}
        if not names:
            raise UserError(f"{path} lists no sequences; write one name a line.")
        return sorted(names)
    return []


def _masks(
    folder: Path, frames: Sequence[Path], suffixes: Sequence[str] = (".png",)
) -> list[tuple[Path, ...]]:
    """The masks of `frames`, found by their names; exactly one for each."""
    # Of files with the same name the one with the first suffix is the mask.
    listed = sorted(
        files(folder, suffixes, "masks"), key=lambda p: -suffixes.index(p.suffix.lower())
    )
    found = {path.stem: path for path in listed}
    alone = [frame.name for frame in frames if frame.stem not in found]
    spare = sorted(found.keys() - {frame.stem for frame in frames})
    if alone or spare:
        lack = f"no mask for {alone[0]}" if alone else f"a mask {spare[0]} without a frame"
        raise UserError(
            f"{folder} has {lack}; it holds {len(found)} masks, {frames[0].parent} {len(frames)} "
            "frames: complete the copy."
        )
    return [(found[frame.stem],) for frame in frames]


def files(folder: Path, suffixes: Sequence[str], kind: str) -> list[Path]:
    """The files of a folder that end so, sorted; `UserError` without the folder or any file."""
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder} of {kind}; complete the copy or shorten the list of "
            "videos."
        )
    # Names with a dot in front are what other systems leave behind.
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    if not found:
        raise UserError(
            f"{folder} holds no {kind} ({' or '.join(suffixes)} files); complete the copy."
        )
    return found


LAYOUTS: dict[str, Layout] = {
    "synthetic": Layout(("JPEGImages/480p", "Annotations/480p"), open_synthetic),
    "davis2016": Layout(("JPEGImages/480p", "Annotations/480p"), open_davis2016),
    "davis2017-unsupervised": Layout(
        ("JPEGImages/480p", "Annotations_unsupervised/480p"), open_davis2017_unsupervised
    ),
    "segtrackv2": Layout(("JPEGImages", "GroundTruth"), open_segtrackv2),
    "fbms59": Layout(("Testset",), open_fbms59),
}


def looks_like(root: Path) -> str | None:
    """The data set whose folders `root` holds; of the two that share theirs, the synthetic one
    where there are categories.
    """
    for name, layout in reversed(LAYOUTS.items()):
        if all((root / folder).is_dir() for folder in layout.folders):
            if name == "davis2016" and (root / "Categories").is_dir():
                return "synthetic"
            return name
    return None
