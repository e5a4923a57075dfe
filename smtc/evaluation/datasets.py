"""Data sets with masks, as lists of files that are found and checked before anything runs."""

import logging
from pathlib import Path

from smtc.errors import UserError
from smtc.evaluation.layouts import LAYOUTS, looks_like, open_segtrackv2
from smtc.evaluation.videos import EvaluationVideo, read_mask

__all__ = ["DATASETS", "EvaluationVideo", "open_dataset", "read_mask"]

DATASETS = tuple(LAYOUTS)
_LOG = logging.getLogger("smtc")


def open_dataset(name: str, root: str | Path, *, penguin: bool = False) -> list[EvaluationVideo]:
    """The videos of data set `name` (one of `DATASETS`) in folder `root`, sorted by name.

    Args: `penguin`: whether in SegTrack-v2 all objects of the sequence of that name are foreground,
    as in every other sequence, or only its first.

    Raises `UserError` for an unknown name, a folder of another layout (it says which one that
    looks like), a missing list, video or mask. Files are listed, not read.
    """
    if name not in LAYOUTS:
        raise UserError(f"There is no data set {name!r}; choose from {', '.join(DATASETS)}.")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; give the data set's root folder.")
    _check_layout(name, root)
    if name == "segtrackv2":
        return open_segtrackv2(root, penguin=penguin)
    return LAYOUTS[name].open(root)


def _check_layout(name: str, root: Path) -> None:
    missing = [folder for folder in LAYOUTS[name].folders if not (root / folder).is_dir()]
    other = looks_like(root)
    if not missing:
        if name == "davis2016" and other == "synthetic":
            _LOG.warning("%s looks like the synthetic set; --dataset synthetic scores more.", root)
        return
    remedy = (
        f"this looks like {other}: use --dataset {other}, or complete the copy of {name}"
        if other
        else f"give the root folder of {name}, or complete the copy"
    )
    raise UserError(f"{root} has no folder {missing[0]}; {remedy}.")
