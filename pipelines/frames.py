"""Where the decoded frames of a clip come from: image files, video files, packed frames."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from smtc.pipelines.clips import Clip
from smtc.pipelines.images import BadFrame, read_image
from smtc.pipelines.video_files import read_frames

Pixels = NDArray[np.uint8]


class Frames(Protocol):
    """What a loader asks for the pixels of clips, in its worker processes too."""

    def read(self, clip: Clip) -> Sequence[Pixels] | Pixels:
        """The clip's frames, RGB uint8 `[h,w,3]` each.

        Raises `BadFrame` for a file that cannot be read, whose clip another one replaces, and
        `UserError` for what should end the run.
        """
        ...


class FileFrames:
    """Decoded from the files each time they are needed.

    `known_bad` are files that were found broken before (path to reason); they are not read again.
    """

    def __init__(self, known_bad: Mapping[str, str] | None = None) -> None:
        self.known_bad = dict(known_bad or {})

    def read(self, clip: Clip) -> Sequence[Pixels]:
        """The clip's frames, which may differ in size."""
        container = clip.video.container
        for path in clip.paths if container is None else (container,):
            if path in self.known_bad:
                raise BadFrame(path, self.known_bad[path])
        if container is None:
            return [read_image(path) for path in clip.paths]
        frames = read_frames(container, [clip.video.timestamps[i] for i in clip.frames])
        if len({frame.shape for frame in frames}) > 1:
            raise BadFrame(container, "the size of its frames changes")
        return frames
