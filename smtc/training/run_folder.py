"""The folder of a run: whose it is, which settings it belongs to, and what cannot be written."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from smtc.config import Config, flatten, to_dict
from smtc.errors import UserError
from smtc.evaluation.manifest import commit, versions
from smtc.public_weights import PUBLIC_NAMES

# Settings that change how a run computes, not what it computes: a run may continue with others.
_FREE_TO_CHANGE = {
    "output",
    "train.device",
    "train.threads",
    "train.compile",
    "train.cuda_graphs",
    "train.checkpoint_activations",
    "model.attention",
    "optim.impl",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.pictures_every",
    "train.nonfinite",
    "train.timeout",
    "data.workers",
    "data.prefetch",
    "data.loader",
    "data.cache",
    "data.cache_memory",
    "data.roi_decode",
    "data.hardware_decoder",
    "data.max_bad_share",
    "model.impl",
    "eval.every",
    "eval.data",
    "eval.dataset",
    "eval.metric",
}

# The same place may be named in several ways.
_WEIGHTS = "model.backbone.weights"  # or a name
_PATHS = {"data.root", "init", _WEIGHTS}

_LOCK, _CONFIG = ".lock", "config.json"
# What a program that died before it had written the settings leaves.
_OURS = {_LOCK, f"{_CONFIG}.partial"}
_METRICS = "metrics.jsonl"
# What there is before the first step ends.
_BEGUN = {*_OURS, _CONFIG, _METRICS, "environment.json", "tensorboard", "bad_files.jsonl"}


def check_run_folder(config: Config) -> Path:
    """The run folder of `config`, looked at but not touched.

    Errors: `UserError` where it holds something else or a run with other settings.
    """
    if config.output is None:
        raise UserError("Where should the run go? Give --output FOLDER.")
    folder = Path(config.output)
    root = config.data.root
    if root is not None and folder.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"{folder} lies inside the data folder {root}; choose another --output.")
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another --output.")
        written = folder / _CONFIG
        if written.exists():
            _refuse_other_settings(written, config)
        elif strangers := sorted({p.name for p in folder.glob("*")} - _OURS):
            raise UserError(
                f"{folder} is not a run folder and holds {strangers[0]!r}; choose another --output."
            )
    return folder


def claim_run_folder(folder: Path, config: Config) -> None:
    """Make the run folder and write the settings into it; `UserError` where that is impossible."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _CONFIG, to_dict(config))
        write_json(folder / "environment.json", {"commit": commit(), "versions": versions()})


@contextmanager
def locked(folder: Path, *, wanted: bool = True) -> Iterator[None]:
    """Inside the block, where `wanted`, no other process may train in `folder`, which is made.

    The system frees the lock of a process that dies. Where the file system has no locks nothing is
    locked. Errors: `UserError` where another process holds it.
    """
    if not wanted:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with path.open("a") as file:
        if not _lock(file, path):
            raise UserError(
                f"Another process trains in {folder}; wait for it or choose another --output."
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _lock(file: TextIO, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A holder who has just left took the file away, and another may have made a new one.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True


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


def _only_begun(folder: Path) -> bool:
    """Whether a run started there and ended before it logged or saved anything, as one does whose
    batch is too large: other settings lose nothing then.
    """
    names = {path.name for path in folder.glob("*")}
    if not {_METRICS, "tensorboard"} <= names <= _BEGUN:
        return False
    return (folder / _METRICS).stat().st_size == 0


def _refuse_other_settings(written: Path, config: Config) -> None:
    try:
        settings = json.loads(written.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{written} is damaged; remove its folder and start anew.")
    # What an older version did not know of was as it is by default.
    before = _comparable(_as_json(Config())) | _comparable(settings)
    now = _comparable(_as_json(config))
    differing = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key not in _FREE_TO_CHANGE
    )
    if differing and not _only_begun(written.parent):
        shown = ", ".join(
            f"{key.replace('_', '-')} {_shown(before.get(key))} (now {_shown(now.get(key))})"
            for key in differing[:4]
        )
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{written.parent} holds a run with other settings: {shown}{more}; go on with its own, "
            "choose another --output or remove it."
        )


def _shown(value: Any) -> str:
    """As a flag takes it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_json(config: Config) -> dict[str, Any]:
    """As `config.json` has it, with lists for tuples."""
    return json.loads(json.dumps(to_dict(config)))


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(Path(value).resolve()) if _is_path(key, value) else value
        for key, value in flatten(settings).items()
    }


def _is_path(key: str, value: Any) -> bool:
    if key == _WEIGHTS and value in PUBLIC_NAMES:
        return False
    return key in _PATHS and isinstance(value, str)


def write_json(path: Path, values: Any) -> None:
    """Write JSON beside `path` and rename it there."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
