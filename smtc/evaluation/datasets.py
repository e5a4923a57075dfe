"""Data sets with masks, as lists of files that are found and checked before anything runs."""

from collections.abc import Callable
from pathlib import Path

from smtc.errors import UserError
from smtc.evaluation.videos import EvaluationVideo, read_mask
from smtc.pipelines.images import FRAME_SUFFIXES

__all__ = ["DATASETS", "EvaluationVideo", "open_dataset", "read_mask"]


def open_dataset(name: str, root: str | Path, *, penguin: bool = False) -> list[EvaluationVideo]:
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
    return EvaluationVideo(name, frames, [(path,) for path in annotations], kinds)


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
