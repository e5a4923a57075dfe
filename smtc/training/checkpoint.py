"""Checkpoints of a run: whole or absent, the newest ones and the best kept.

A checkpoint is a folder `checkpoints/step_<step>` in the format of torch.distributed.checkpoint,
with a `state.json` that says how long its files are. It is written under another name, in a thread
of its own while training goes on with a copy of the state taken before, and renamed when it is
whole: a program that dies while it writes leaves nothing that counts.
"""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from smtc.errors import UserError
from smtc.training.run_folder import write_json

logger = logging.getLogger("smtc")

State = dict[str, Any]
"""Nested dictionaries of tensors."""

_STATE, _BEST = "state.json", "best.json"


class Checkpoints:
    """The checkpoints of one run folder, of which the newest `keep` and the best stay."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder / "checkpoints"
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, sample: int, state: State, *, score: float | None = None) -> None:
        """Copy `state` to memory and start to write it as the checkpoint of `step`.

        `sample` is the global index of the first sample not yet seen. The checkpoint with the
        greatest `score` is the best one. Waits for the write before this one; raises `UserError`
        where that one failed.
        """
        self.wait()
        # Copied here and now, because the next step changes the tensors.
        copied = {name: value.to("cpu", copy=True) for name, value in _flat(state)}
        self._writing = self._writer.submit(self._write, step, sample, copied, score)

    def wait(self) -> None:
        """Until what was saved is on the disk; `UserError` where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint so far."""
        try:
            found = json.loads((self._folder / _BEST).read_text(encoding="utf-8"))
            return int(found["step"]), float(found["score"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def newest(self) -> str:
        """A sentence that names the newest checkpoint, once it is on the disk."""
        self.wait()
        found = checkpoints(self._folder)
        return f"The last checkpoint is {found[-1]}." if found else "There is no checkpoint yet."

    def _write(self, step: int, sample: int, state: dict[str, Tensor], score: float | None) -> None:
        target = self._folder / f"step_{step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        if _readable(target):
            return  # the run ends at the step it started from, with the state it read there
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _dump(state, partial)
            sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
            write_json(partial / _STATE, {"step": step, "sample": sample, "bytes": sizes})
            # Before the checkpoint counts: a run killed in between goes on from the one before and
            # comes by this score again; a run killed after it would not.
            best = self.best()
            if score is not None and math.isfinite(score) and (best is None or score > best[1]):
                write_json(self._folder / _BEST, {"step": step, "score": score})
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _flush(self._folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"The checkpoint {target} could not be written ({error.strerror}); free some space "
                "and run the same command again: it continues from the last one."
            ) from error
        self._prune(target)

    def _prune(self, newest: Path) -> None:
        best = self.best()
        # The run came back before those of later steps because they are damaged.
        kept = [path for path in checkpoints(self._folder) if path <= newest][-self._keep :]
        for folder in checkpoints(self._folder):
            if folder not in kept and (best is None or folder.name != f"step_{best[0]:08d}"):
                shutil.rmtree(folder, ignore_errors=True)
        for leftover in self._folder.glob(".step_*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's `checkpoints` folder, by step."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def latest_checkpoint(folder: Path) -> State | None:
    """The newest checkpoint of the run in `folder` that can be read, or None where there is none.

    Besides what was saved it holds `step` and `sample`. A damaged one is named and the one before
    it taken; nothing but damaged ones is a `UserError`.
    """
    found = checkpoints(folder / "checkpoints")
    for path in reversed(found):
        try:
            return _read(path)
        except UserError as error:
            logger.warning("%s", error)
    if found:
        raise UserError(
            f"{found[-1]} is damaged, and so is every checkpoint before it; "
            f"remove {folder} and start anew."
        )
    return None


def _readable(path: Path) -> bool:
    try:
        _read(path)
    except UserError:
        return False
    return True


def _read(path: Path) -> State:
    """A checkpoint; `UserError` where it is damaged."""
    try:
        head = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name, size in head["bytes"].items():
            if (path / name).stat().st_size != size:
                raise UserError(f"The checkpoint {path} is damaged: {name} is cut short.")
        return {**_nested(_load(path)), "step": int(head["step"]), "sample": int(head["sample"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, CheckpointException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"The checkpoint {path} is damaged ({reason}).") from error


def _dump(state: dict[str, Tensor], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    except CheckpointException as failure:
        # torch hides what is wrong with a disk behind errors of its own.
        error: BaseException | None = next(iter(failure.failures.values()))[0]
        while error is not None and not isinstance(error, OSError):
            error = error.__cause__ or error.__context__
        raise failure if error is None else error from None


def _load(folder: Path) -> dict[str, Tensor]:
    reader = dcp.FileSystemReader(folder)
    tensors = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(saved.size, dtype=saved.properties.dtype)
        for name, saved in tensors.items()
        if isinstance(saved, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries, by keys joined with slashes, which no key contains."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value.detach()


def _nested(flat: Mapping[str, Tensor]) -> State:
    state: State = {}
    for name, value in flat.items():
        *outer, last = name.split("/")
        inner = state
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return state


def _flush(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
