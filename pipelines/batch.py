"""What every loader yields."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smtc.pipelines.clips import Clip


@dataclass(frozen=True)
class Source:
    """Where a clip came from."""

    video: str
    frames: tuple[str, ...]
    """Paths of the files; `<path>#<position>` in a video file."""
    start: int
    gap: int

    @classmethod
    def of(cls, clip: Clip) -> "Source":
        """The source that `clip` describes."""
        return cls(clip.video.name, clip.paths, clip.start, clip.gap)


@dataclass(frozen=True)
class Batch:
    """Two augmented views of B clips."""

    views: Tensor
    """`[B,2,T,3,H,W]` float32 or bfloat16, normalised.

    On a GPU the DALI loader hands out one and the same tensor each time, written anew for a batch.
    """
    sources: list[Source]
    index: Tensor
    """`[B]` int64, global sample indices."""
    spatial: Tensor | None = None
    """`[B,2,5]` float32: x, y, width, height of a view's crop as shares of the frame; 1 if flipped.

    None when both views of a clip share crop and flip.
    """

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; the copy is asynchronous from pinned memory."""
        spatial = None if self.spatial is None else self.spatial.to(device, non_blocking=True)
        return replace(
            self,
            views=self.views.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            spatial=spatial,
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        spatial = None if self.spatial is None else self.spatial.pin_memory()
        return replace(
            self, views=self.views.pin_memory(), index=self.index.pin_memory(), spatial=spatial
        )
