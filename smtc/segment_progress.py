"""What is kept of a video that is being segmented, so that a stopped command goes on."""

import dataclasses
import json
import logging
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smtc.evaluation.kept_scores import code_hash, key_of, stamps
from smtc.evaluation.manifest import versions, weights_hash
from smtc.inference import InferenceSettings
from smtc.model import SMTC
from smtc.pipelines.frame_source import FrameSource

_LOG = logging.getLogger("smtc")
_STATE, _FRAMES = ".state.npz", ".frames.jsonl"


class Told(NamedTuple):
    """What is kept of a frame beside its mask."""

    background: int
    """The semantic slot taken for background."""
    scores: dict[int, float]


class SegmentProgress:
    """The chunks that are done, in the folder that is being written; `done` counts their frames.

    `key` decides whether a folder that a stopped command left is this command's.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self.told: list[Told] = []
        self.state: dict[str, NDArray[Any]] = {}
        self._written = 0

    @property
    def done(self) -> int:
        """Frames whose mask and scores need not be made again."""
        return self._written

    def goes_on(self, folder: Path) -> bool:
        """Whether `folder` is what a stopped command of the same key left; if so, takes it over."""
        # Whatever is damaged there is made again.
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(folder / _STATE) as kept:
                state = {name: kept[name] for name in kept.files}
            if str(state.pop("key")) != self._key:
                return False
            done = int(state.pop("done"))
            lines = (folder / _FRAMES).read_text(encoding="utf-8").splitlines()[:done]
            if min(len(lines), len(list(folder.glob("masks/*/*.png")))) < done:
                return False
            self.told = [_read(line) for line in lines]
            self.state, self._written = state, done
            (folder / _FRAMES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            _LOG.info("Going on after the %d frames that an earlier call did.", done)
            return True
        return False

    def add(self, background: int, scores: Mapping[int, float]) -> Told:
        """What is to be kept of the next frame, once its chunk is done."""
        self.told.append(Told(background, dict(scores)))
        return self.told[-1]

    def chunk_done(self, folder: Path, state: Mapping[str, NDArray[Any]]) -> None:
        """All frames so far are written, and `state` is what follows them."""
        with (folder / _FRAMES).open("a", encoding="utf-8") as file:
            for told in self.told[self._written :]:
                file.write(json.dumps(told) + "\n")
        partial = folder / f"{_STATE}.partial.npz"
        counts: dict[str, Any] = {"key": np.array(self._key), "done": np.array(len(self.told))}
        np.savez(partial, **counts, **dict[str, Any](state))
        partial.replace(folder / _STATE)
        self._written = len(self.told)

    def close(self, folder: Path) -> None:
        """The video is done: nothing is left of this in `folder`."""
        for name in (_STATE, _FRAMES):
            (folder / name).unlink(missing_ok=True)


def _read(line: str) -> Told:
    background, scores = json.loads(line)
    return Told(background, {int(number): score for number, score in scores.items()})


def progress_key(
    model: SMTC, video: FrameSource, settings: InferenceSettings, options: Mapping[str, Any]
) -> str:
    """A name for all that a result follows from: model, frames (name, size and time of change of
    their files), settings and code.
    """
    files = [Path(video.container)] if video.container else [Path(path) for path in video.frames]
    deciding = {
        "weights": weights_hash(model),
        "model": repr(model.config),
        "video": [video.name, len(video), stamps(Path("/"), files)],
        "settings": dataclasses.asdict(settings),
        "code": code_hash(),
        "device": next(model.parameters()).device.type,
        "versions": versions(),
        **options,
    }
    return key_of(deciding)
