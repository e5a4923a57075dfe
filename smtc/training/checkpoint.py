"""Simple checkpoints: one file a save, written beside its name and renamed, the last two kept."""

import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smtc.config import Config, flatten, to_dict
from smtc.errors import UserError
from smtc.weight_files import read_checkpoint

logger = logging.getLogger("smtc")

KEPT = 2

# Settings that change how a run computes, not what it computes: a run may continue with others.
_FREE_TO_CHANGE = {
    "output",
    "train.device",
    "train.threads",
    "train.log_every",
    "train.checkpoint_every",
    "data.workers",
    "data.prefetch",
    "data.loader",
    "data.cache",
    "data.cache_memory",
    "data.roi_decode",
    "data.hardware_decoder",
    "data.max_bad_share",
    "model.impl",
}

# The same place may be named in several ways.
_PATHS = {"data.root", "init", "model.backbone.weights"}


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as `checkpoints/step_<step>.pt` under the run folder and drop the oldest."""
    target = folder / "checkpoints" / f"step_{step:08d}.pt"
    partial = target.with_suffix(".partial")
    try:
        target.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.write(_serialised({"step": step, **state}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint {target} could not be written ({error.strerror}); free some space "
            "and run the same command again: it continues from the last one."
        ) from error
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return target


def _serialised(state: dict[str, Any]) -> memoryview:
    # Through memory, because torch hides what is wrong with a disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that can be read, or None where there is none."""
    files = _checkpoints(folder)
    for file in reversed(files):
        try:
            return read_checkpoint(file)
        except UserError as error:
            logger.warning("%s", error)
    if files:
        raise UserError(
            f"{files[-1]} is damaged, and so is every checkpoint before it; "
            f"remove {folder} and start anew."
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*.pt"))


def check_run_folder(config: Config) -> Path:
    """The run folder of `config`, looked at but not touched.

    Errors: `UserError` where it holds something else or a run with other settings.
    """
    if config.output is None:
        raise UserError("Where should the run go? Give --output FOLDER.")
    folder = Path(config.output)
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another --output.")
        written = folder / "config.json"
        if written.exists():
            _refuse_other_settings(written, config)
        elif strangers := sorted(p.name for p in folder.glob("*")):
            raise UserError(
                f"{folder} is not a run folder and holds {strangers[0]!r}; choose another --output."
            )
    return folder


def claim_run_folder(folder: Path, config: Config) -> None:
    """Make the run folder and write the settings into it; `UserError` where that is impossible."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", to_dict(config))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside the block, a folder that cannot be written or a full disk is a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be written ({error.strerror}); free some space or "
            "choose another --output."
        ) from error


def _refuse_other_settings(written: Path, config: Config) -> None:
    try:
        settings = json.loads(written.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{written} is damaged; remove its folder and start anew.")
    before = _comparable(settings)
    now = _comparable(json.loads(json.dumps(to_dict(config))))
    differing = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key not in _FREE_TO_CHANGE
    )
    if differing:
        shown = ", ".join(f"{k} ({before.get(k)} → {now.get(k)})" for k in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{written.parent} holds a run with other settings: {shown}{more}; "
            "choose another --output or remove it."
        )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(Path(value).resolve()) if key in _PATHS and isinstance(value, str) else value
        for key, value in flatten(settings).items()
    }


def write_json(path: Path, values: Any) -> None:
    """Write JSON beside `path` and rename it there."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
