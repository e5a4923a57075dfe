"""Data sets with masks, as lists of files that are found and checked before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.images import FRAME_SUFFIXES, BadFrame, read_ids, read_image

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class EvaluationVideo:
    """The files of one video; `annotations` and `categories` run parallel to `frames`."""

    name: str
    frames: list[Path]
    annotations: list[Path | None]
    """The mask of each frame, None where a data set annotates only some."""
    categories: list[Path] | None = None
    """Category ids of each frame, where the data set has them."""

    def load_frames(self) -> Pixels:
        """All frames, RGB uint8 `[F,h,w,3]`; a bad or odd-sized one is a `UserError`."""
        return _stack([read_image(path) for path in self.frames], self.frames)

    def load(self) -> tuple[Pixels, Pixels]:
        """All frames, and ids uint8 `[A,h,w]` of the `annotated` ones; errors as `load_frames`."""
        frames = self.load_frames()
        paths = [path for path in self.annotations if path is not None]
        masks = _stack([read_mask(path) for path in paths], paths)
        if masks.shape[1:] != frames.shape[1:3]:
            raise BadFrame(paths[0], "the annotation differs in size from its frame")
        return frames, masks

    @property
    def annotated(self) -> list[int]:
        """Positions of the frames that have a mask."""
        return [index for index, path in enumerate(self.annotations) if path is not None]

    @property
    def files(self) -> list[Path]:
        """All files that scores depend on."""
        return [*self.frames, *(path for path in self.annotations if path is not None)]


def read_mask(path: str | Path) -> Pixels:
    """The ids `[h,w]` of a palette or 8-bit grey PNG, as stored; `BadFrame` names a bad file."""
    try:
        return read_ids(path)
    except BadFrame as error:
        raise BadFrame(path, f"annotation, {error.reason}") from None


def _stack(images: list[Pixels], paths: list[Path]) -> Pixels:
    for image, path in zip(images, paths, strict=True):
        if image.shape != images[0].shape:
            size, first = (f"{shape[1]}x{shape[0]}" for shape in (image.shape, images[0].shape))
            raise BadFrame(path, f"its size {size} is not that of the video's first, {first}")
    return np.stack(images)


def open_dataset(name: str, root: str | Path) -> list[EvaluationVideo]:
    """The videos of data set `name` ("synthetic" or "davis2016") in folder `root`, sorted by name.

    Raises `UserError` for an unknown name, a missing folder, list, video or mask, or a count of
    masks that is not the count of frames. Files are listed, not read.
    """
    if name not in DATASETS:
        raise UserError(f"There is no data set {name!r}; choose from {', '.join(DATASETS)}.")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; give the data set's root folder.")
    return DATASETS[name](root)


def _open_synthetic(root: Path) -> list[EvaluationVideo]:
    names = _subfolders(_layout(root, "JPEGImages"))
    return [_video(root, name, categories=True) for name in names]


def _open_davis2016(root: Path) -> list[EvaluationVideo]:
    names = _listed(root) or _subfolders(_layout(root, "JPEGImages"))
    return [_video(root, name, categories=False) for name in sorted(names)]


DATASETS: dict[str, Callable[[Path], list[EvaluationVideo]]] = {
    "synthetic": _open_synthetic,
    "davis2016": _open_davis2016,
}


def _layout(root: Path, kind: str) -> Path:
    folder = root / kind / "480p"
    if not folder.is_dir():
        raise UserError(
            f"{root} has no folder {kind}/480p; give the root of a data set in DAVIS layout."
        )
    return folder


def _subfolders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise UserError(f"{folder} holds no videos; each should be a folder of frames.")
    return names


def _listed(root: Path) -> list[str]:
    """The validation sequences that DAVIS-2016 lists, by name or as pairs of files; else []."""
    for place in ("ImageSets/2016/val.txt", "ImageSets/480p/val.txt", "480p/val.txt"):
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


def _video(root: Path, name: str, *, categories: bool) -> EvaluationVideo:
    frames = _files(_layout(root, "JPEGImages") / name, FRAME_SUFFIXES)
    annotations = _masks(_layout(root, "Annotations") / name, frames)
    kinds = None
    if categories and (root / "Categories").is_dir():
        kinds = _masks(_layout(root, "Categories") / name, frames)
    return EvaluationVideo(name, frames, list(annotations), kinds)


def _masks(folder: Path, frames: list[Path]) -> list[Path]:
    """The masks of `frames`, found by their names; exactly one for each."""
    found = _files(folder, (".png",))
    if len(found) != len(frames):
        raise UserError(
            f"{folder} holds {len(found)} masks, {frames[0].parent} {len(frames)} frames; "
            "complete the copy."
        )
    for mask, frame in zip(found, frames, strict=True):
        if mask.stem != frame.stem:
            raise UserError(f"{folder} has no mask for {frame.name}; complete the copy.")
    return found


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}; complete the copy or shorten the list of videos."
        )
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{folder} holds no {' or '.join(suffixes)} files; complete the copy.")
    return files
