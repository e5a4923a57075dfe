"""What a model must beat: colour k-means, fixed grids and boxes, k-means on an encoder's features.

Every clustering gives one-hot masks on a grid that are upsampled like the model's own, and is
scored by the same code.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from smtc.evaluation.datasets import EvaluationVideo
from smtc.evaluation.protocols import label_frames, mean_row, score_video
from smtc.evaluation.results import Row
from smtc.inference import evaluating
from smtc.model import SMTC
from smtc.pipelines.views import prepare_frames
from smtc.progress import track

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer]
Encode = Callable[[Tensor], Tensor]
"""Frames `[F,3,H,W]`, normalised, to features `[F,D,rows,columns]`."""

GRIDS = ((2, 2), (2, 4), (3, 3), (4, 4))
CLUSTERS = (4, 6, 8)
FITTED = 2**15
"""Tokens that k-means is fitted to; of a video that has more, those of evenly spread frames."""
CHUNK = 16
"""Frames that an encoder sees at once."""


def grid_labels(frames: Pixels, rows: int, columns: int) -> Pixels:
    """Frames `[F,h,w,3]` cut into `rows` x `columns` fixed rectangles: labels uint8 `[F,h,w]`."""
    count, height, width = frames.shape[:3]
    y = np.arange(height) * rows // height
    x = np.arange(width) * columns // width
    cells = (y[:, None] * columns + x).astype(np.uint8)
    return np.broadcast_to(cells, (count, height, width))


def colour_labels(frames: Pixels, clusters: int, *, patch: int = 8, seed: int = 0) -> Pixels:
    """K-means of the mean colours of all patches of one video: labels uint8 `[F,h,w]`."""
    height, width = frames.shape[1:3]
    grid = max(1, width // patch), max(1, height // patch)
    means = np.stack([cv2.resize(f, grid, interpolation=cv2.INTER_AREA) for f in frames])
    return cluster_labels(
        torch.from_numpy(means).float().movedim(-1, 1), clusters, frames.shape[1:3], seed=seed
    )


def cluster_labels(
    features: Tensor, clusters: int, size: tuple[int, int], *, seed: int = 0
) -> Pixels:
    """K-means of all features `[F,D,rows,columns]` of one video: labels uint8 `[F,*size]`.

    Fitted to each video by itself, on the features as they are: what the warm start trains is their
    Euclidean distance. The start is k-means++ from `seed`.
    """
    count, _, rows, columns = features.shape
    _, labels = _kmeans(_points(features), clusters, seed)
    return enlarge(labels.reshape(count, rows, columns), clusters, size)


def enlarge(labels: Labels, clusters: int, size: tuple[int, int]) -> Pixels:
    """Labels `[F,rows,columns]` below `clusters` as uint8 `[F,*size]`, upsampled like masks."""
    masks = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), clusters)
    return label_frames(masks.movedim(-1, 1).float(), size)


def cluster_video(
    frames: Callable[[], Iterator[Tensor]],
    count: int,
    positions: Sequence[int],
    encode: Encode,
    clusters: int,
    *,
    seed: int = 0,
) -> Labels:
    """K-means of one video's features: labels on the grid of tokens, int32 `[A,rows,columns]`.

    `frames` starts anew to yield the video's `count` frames, each `[1,3,H,W]`; labels are those of
    the A `positions`. As `cluster_labels`, but a token goes to the nearest of the final centres,
    and what is held does not grow with the video beyond `FITTED` tokens.
    """
    rows, columns = encode(next(frames())).shape[-2:]
    most = max(1, FITTED // (rows * columns))
    fitted = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
    points = dict(_encoded(frames(), fitted, encode))
    centres, _ = _kmeans(np.concatenate(list(points.values())), clusters, seed)
    labels = {index: _nearest(points[index], centres) for index in positions if index in points}
    del points
    others = [index for index in positions if index not in labels]
    if others:
        labels |= {i: _nearest(own, centres) for i, own in _encoded(frames(), others, encode)}
    return np.stack([labels[index].reshape(rows, columns) for index in positions])


def _encoded(
    frames: Iterable[Tensor], positions: Sequence[int], encode: Encode
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Position and tokens `[L,D]` of the frames at `positions`, a few frames at a time."""
    wanted = set(positions)
    chosen = ((index, frame) for index, frame in enumerate(frames) if index in wanted)
    while chunk := list(islice(chosen, CHUNK)):
        features = encode(torch.cat([frame for _, frame in chunk]))
        for (index, _), own in zip(chunk, features, strict=True):
            yield index, _points(own[None])


def _points(features: Tensor) -> NDArray[np.float64]:
    """`[F,D,rows,columns]` as `[F·L,D]`."""
    return features.movedim(1, -1).flatten(0, 2).double().numpy()


def _nearest(points: NDArray[np.float64], centres: NDArray[np.float64]) -> Labels:
    return vq(points, centres, check_finite=False)[0]


def _kmeans(
    points: NDArray[np.float64], clusters: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Centres and labels of the best of three runs, by the distance within clusters."""
    found, least = (points[:clusters], np.zeros(len(points), np.int64)), np.inf
    for start in range(3):
        with warnings.catch_warnings():
            # Fewer distinct points than clusters: some stay empty, which is harmless here.
            warnings.simplefilter("ignore")
            generator = np.random.default_rng([seed, start])
            centres, labels = kmeans2(points, clusters, minit="++", seed=generator)
        spread = ((points - centres[labels]) ** 2).sum()
        if spread < least:
            found, least = (centres, labels.astype(np.int64)), spread
    return found


def baseline_rows(
    videos: Sequence[EvaluationVideo],
    *,
    patch: int = 8,
    seed: int = 0,
) -> list[Row]:
    """The rows of the baselines without a model: colour k-means and fixed grids."""
    names = [f"colour k-means, k = {k}" for k in CLUSTERS]
    names += [f"fixed grid {rows}x{columns}" for rows, columns in GRIDS]
    per_video: dict[str, list[dict]] = {name: [] for name in names}
    for video in track(videos, title="baselines", unit="video"):
        frames, truth = video.load()
        maps = [colour_labels(frames, k, patch=patch, seed=seed) for k in CLUSTERS]
        maps += [grid_labels(frames, *grid) for grid in GRIDS]
        for name, labels in zip(names, maps, strict=True):
            per_video[name].append(score_video(labels[video.annotated], truth))
    return [{"model": name, **mean_row(scores)} for name, scores in per_video.items()]


def feature_row(
    model: SMTC,
    videos: Sequence[EvaluationVideo],
    name: str,
    *,
    clusters: int = 4,
    seed: int = 0,
) -> Row:
    """The row `name` of k-means on a model's encoder features, fitted to each video by itself."""
    scores = []
    for video in track(videos, title=name, unit="video"):
        frames, truth = video.load()
        labels = cluster_labels(
            encode_frames(model, frames), clusters, frames.shape[1:3], seed=seed
        )
        scores.append(score_video(labels[video.annotated], truth))
    return {"model": name, **mean_row(scores)}


def encode_frames(model: SMTC, frames: Pixels) -> Tensor:
    """The encoder's features of frames `[F,h,w,3]`: float32 `[F,D,rows,columns]` on the CPU."""
    return encoding(model)(prepare_frames(frames, model.config.resolution))


def encoding(model: SMTC) -> Encode:
    """The features of a model's encoder: float32 on the CPU, whatever mode the model is in."""

    def encode(inputs: Tensor) -> Tensor:
        with evaluating(model):
            features, grid = model.encode(inputs[None].to(next(model.parameters()).device))
        return features[0].float().cpu().transpose(1, 2).unflatten(-1, grid)

    return encode
