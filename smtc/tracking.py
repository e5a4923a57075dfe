"""Ids that follow objects: what a frame shows is matched with what was seen before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float32]

MATCHED = 0.2
"""The least mean of overlap and likeness at which an object is one that was seen before."""
REMEMBERED = 32
"""Frames for which an object that is out of sight can be found again."""
_KEPT = 0.8  # of an object's embedding when it is seen again; the rest is the new one


@dataclass
class _Track:
    id: int
    mask: Floats
    embedding: Floats
    seen: int
    """The last frame."""


class Tracker:
    """Gives ids to the objects of one video's frames, in order.

    Objects of a frame and those seen before are matched one to one with the greatest sum of
    (overlap + likeness) / 2: the IoU of their masks, of which the old one is the last that was
    seen, and the cosine of their embeddings. Pairs below `MATCHED` are no match. Ids count from 1
    in order of appearance; when `max_objects` are given away, a new object takes over the id that
    was out of sight for longest.
    """

    def __init__(self, max_objects: int = 255) -> None:
        self._max = max_objects
        self._tracks: list[_Track] = []
        self._frame = 0

    def update(self, masks: Floats, embeddings: Floats) -> NDArray[np.int64]:
        """The ids `[K]` of the next frame's objects, K at most `max_objects`; all of them differ.

        Args: what each shows of the frame `masks [K,rows,columns]` in [0, 1], and its unit
        `embeddings [K,D]`.
        """
        ids = np.zeros(len(masks), np.int64)
        recent = [t for t in self._tracks if self._frame - t.seen <= REMEMBERED]
        for new, old in _matches(recent, masks, embeddings):
            track = recent[old]
            mixed = _KEPT * track.embedding + (1 - _KEPT) * embeddings[new]
            track.embedding = mixed / max(float(np.linalg.norm(mixed)), 1e-12)
            track.mask, track.seen = masks[new], self._frame
            ids[new] = track.id
        for new in np.flatnonzero(ids == 0).tolist():
            ids[new] = self._begin(masks[new], embeddings[new])
        self._frame += 1
        return ids

    def forget(self) -> None:
        """A scene has ended: nothing that was seen before is found again."""
        for track in self._tracks:
            track.seen = min(track.seen, self._frame - REMEMBERED - 1)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that is remembered, as arrays that `restore` takes."""
        tracks = self._tracks
        return {
            "frame": np.array(self._frame),
            "ids": np.array([track.id for track in tracks], np.int64),
            "seen": np.array([track.seen for track in tracks], np.int64),
            "masks": np.array([track.mask for track in tracks], np.float32),
            "embeddings": np.array([track.embedding for track in tracks], np.float32),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `state`."""
        self._frame = int(state["frame"])
        fields = (state[name] for name in ("ids", "masks", "embeddings", "seen"))
        self._tracks = [
            _Track(int(number), mask, embedding, int(seen))
            for number, mask, embedding, seen in zip(*fields, strict=True)
        ]

    def _begin(self, mask: Floats, embedding: Floats) -> int:
        number = len(self._tracks) + 1
        if number > self._max:
            longest = min(self._tracks, key=lambda track: track.seen)
            self._tracks.remove(longest)
            number = longest.id
        self._tracks.append(_Track(number, mask, embedding, self._frame))
        return number


def _matches(tracks: list[_Track], masks: Floats, embeddings: Floats) -> list[tuple[int, int]]:
    """Pairs (object of the frame, track)."""
    if not tracks or not len(masks):
        return []
    old = np.stack([track.mask for track in tracks]).reshape(len(tracks), -1)
    new = masks.reshape(len(masks), -1)
    shared = np.minimum(new[:, None], old[None]).sum(-1)
    union = new.sum(-1)[:, None] + old.sum(-1)[None] - shared
    likeness = embeddings @ np.stack([track.embedding for track in tracks]).T
    score = (shared / np.maximum(union, 1e-12) + likeness) / 2
    # A pair that is no match must not keep either of the two from another.
    score = np.where(score >= MATCHED, score, 0)
    pairs = zip(*linear_sum_assignment(score, maximize=True), strict=True)
    return [(int(n), int(o)) for n, o in pairs if score[n, o] > 0]
