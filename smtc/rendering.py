"""From soft masks on the grid of tokens to masks of a frame's size."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]

MOST_IDS = 255
"""Ids that a mask file can hold beside the background."""


@dataclass(frozen=True)
class SoftMasks:
    """What a frame's instance slots say, slot p of semantic n being number n·P + p."""

    masks: Tensor
    """`[N·P,rows,columns]`"""
    semantics: Tensor
    """The semantic of each, int64 `[N·P]`."""
    scores: Tensor
    """`[N·P]`: cosine of the semantic and the instance slot."""
    candidates: Tensor
    """Bool `[N·P]`: score and area are large enough."""


@dataclass(frozen=True)
class FrameMasks:
    """The objects of a frame, K of them, before they have ids."""

    size: tuple[int, int]
    slots: NDArray[np.int64]
    """`[K]`: the number n·P + p of each object's slot, ascending."""
    scores: NDArray[np.float32]
    """`[K]`"""
    soft: Tensor
    """`[K,rows,columns]`"""
    labels: Pixels
    """`[h,w]`: 0, or 1 + the place of the object that a pixel shows."""
    threshold: float | None
    """Of the stretched mask of an object that may overlap others; none: objects do not overlap."""

    def paint(self, ids: NDArray[np.integer]) -> Pixels:
        """The mask `[h,w]` in which each object has its id of `ids [K]`."""
        return np.concatenate([[0], ids]).astype(np.uint8)[self.labels]

    def visible(self) -> NDArray[np.float32]:
        """The share of each token that each object is seen in, `[K,rows,columns]`.

        Of a frame larger than the grid up to 8 x 8 points a token are looked at.
        """
        grid, points = self.soft.shape[1:], []
        for tokens, pixels in zip(grid, self.size, strict=True):
            each = max(1, min(8, pixels // tokens))
            points.append((np.arange(tokens * each) + 0.5) * pixels // (tokens * each))
        seen = self.labels[points[0].astype(int)][:, points[1].astype(int)]
        cells = seen.reshape(grid[0], -1, grid[1], len(points[1]) // grid[1])
        places = np.arange(1, len(self.slots) + 1)[:, None, None, None, None]
        return (cells == places).mean((2, 4), dtype=np.float32)

    def proposals(self) -> NDArray[np.bool_]:
        """Each object's own mask `[K,h,w]`, by falling score."""
        falling = np.argsort(-self.scores, kind="stable")
        if self.threshold is None:
            return np.asarray(self.labels == (falling + 1)[:, None, None])
        rows, columns = _nearest(self.soft.shape[1:], self.size)
        stretched = _stretched(self.soft[:, rows][:, :, columns], self.threshold)
        return stretched.numpy()[falling]


def soft_masks(
    semantic: Tensor,
    instance: Tensor,
    scores: Tensor,
    *,
    similarity: float,
    threshold: float,
    min_area: float,
) -> SoftMasks:
    """Which instance slots of a frame are candidates: score at least `similarity`, and the share of
    the frame in which the semantic mask exceeds `threshold` at least `min_area`.

    Args: `semantic [N,rows,columns]`, `instance [N,P,rows,columns]`, `scores [N,P]`.
    """
    covered = (semantic > threshold).float().mean((1, 2))  # [N]
    candidates = (scores >= similarity) & (covered >= min_area)[:, None]
    semantics = torch.arange(len(semantic))[:, None].expand_as(scores)
    return SoftMasks(
        instance.flatten(0, 1), semantics.flatten(), scores.flatten(), candidates.flatten()
    )


def frame_masks(
    soft: SoftMasks,
    size: tuple[int, int],
    *,
    background: int | None,
    threshold: float,
    min_object: float,
    max_objects: int,
) -> FrameMasks:
    """The objects of a frame at the height and width `size`.

    With a `background`, every pixel goes to the strongest of all candidates and of the background,
    which is all instance masks of that semantic; masks are upsampled bilinearly. Without, as in the
    authors' script, a candidate's mask is upsampled to the nearest, stretched to [0, 1] and
    thresholded; candidates are painted by rising score. Objects that cover less than `min_object`
    of the frame, and all but the `max_objects` largest, are left out.
    """
    if background is None:
        slots, labels = _paint(soft, threshold, size)
    else:
        slots, labels = _compete(soft, background, size)
    area = np.bincount(labels.ravel(), minlength=len(slots) + 1)[1:]
    largest = np.argsort(-area, kind="stable")[:max_objects]
    kept = np.sort(largest[(area[largest] > 0) & (area[largest] >= min_object * labels.size)])
    renumber = np.zeros(len(slots) + 1, np.uint8)
    renumber[kept + 1] = np.arange(1, len(kept) + 1)
    slots = slots[kept]
    return FrameMasks(
        size=size,
        slots=slots,
        scores=soft.scores[slots].numpy(),
        soft=soft.masks[slots],
        labels=renumber[labels],
        threshold=threshold if background is None else None,
    )


def _compete(
    soft: SoftMasks, background: int, size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """The slots that may be seen, and for each pixel 1 + the place of its slot, or 0."""
    behind = soft.semantics == background
    competing = (soft.candidates | behind).nonzero()[:, 0]
    competing = competing[_may_win(soft.masks[competing])]
    shown = competing[~behind[competing]]
    place = torch.zeros(len(soft.scores), dtype=torch.int64)
    place[shown] = torch.arange(1, len(shown) + 1)
    won = winners(soft.masks[competing], size)
    return shown.numpy(), place[competing].numpy().astype(np.int16)[won]


def _paint(
    soft: SoftMasks, threshold: float, size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    chosen = soft.candidates.nonzero()[:, 0]
    # Only the rows and columns that a nearest upsampling takes, so that it can come last.
    rows, columns = _nearest(soft.masks.shape[1:], size)
    used_rows, back_rows = torch.unique(rows, return_inverse=True)
    used_columns, back_columns = torch.unique(columns, return_inverse=True)
    masks = _stretched(soft.masks[chosen][:, used_rows][:, :, used_columns], threshold)
    labels = torch.zeros(masks.shape[1:], dtype=torch.int16)
    for place in soft.scores[chosen].argsort(stable=True).tolist():
        labels[masks[place]] = place + 1
    return chosen.numpy(), labels[back_rows][:, back_columns].numpy()


def _stretched(masks: Tensor, threshold: float) -> Tensor:
    """Where masks `[K,rows,columns]`, stretched to [0, 1], exceed `threshold`; bool."""
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    return masks - low > threshold * (high - low)


def _nearest(grid: tuple[int, ...], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows and columns of a grid that torch's nearest upsampling to `size` takes."""

    def taken(old: int, new: int) -> Tensor:
        index = torch.arange(old, dtype=torch.float32)[None, None]
        return F.interpolate(index, new, mode="nearest")[0, 0].long()

    return taken(grid[0], size[0]), taken(grid[1], size[1])


def winners(masks: Tensor, size: tuple[int, int]) -> Pixels:
    """The strongest of soft masks `[K,rows,columns]` at each pixel, `[h,w]`; uint8 up to 256 masks,
    else int16.

    Masks are upsampled bilinearly first; ties go to the first mask.
    """
    able = _may_win(masks)
    # One mask at a time: an argmax over the leading dimension is several times slower.
    best = _upsample(masks[able[0]], size)
    small = torch.uint8 if len(masks) <= 256 else torch.int16
    label = torch.full(size, int(able[0]), dtype=small)
    for index in able[1:].tolist():
        mask = _upsample(masks[index], size)
        label.masked_fill_(mask > best, index)
        torch.maximum(best, mask, out=best)
    return label.numpy()


def _upsample(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _may_win(masks: Tensor) -> Tensor:
    """The numbers of the masks `[K,rows,columns]` that can be the strongest at a pixel, ascending.

    Between four tokens a mask has no more than the largest of their values, and the strongest mask
    no less than the smallest of its own: most of many masks cannot win anywhere, and need not be
    upsampled.
    """
    padded = F.pad(masks[:, None], (1, 1, 1, 1), mode="replicate")
    most = F.max_pool2d(padded, 2, stride=1)[:, 0]
    least = -F.max_pool2d(-padded, 2, stride=1)[:, 0]
    # Interpolation rounds.
    able = (most >= least.amax(0) - 1e-5).flatten(1).any(1)
    return able.nonzero()[:, 0]
