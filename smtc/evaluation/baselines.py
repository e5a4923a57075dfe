"""What a model must beat: colour k-means, fixed grids, and k-means on an encoder's features.

Every baseline gives one-hot masks on a grid that are upsampled like the model's own, and is scored
by the same code.
"""

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor

from smtc.evaluation.datasets import EvaluationVideo
from smtc.evaluation.discovery import Row
from smtc.evaluation.protocols import label_frames, mean_row, score_video
from smtc.inference import evaluating
from smtc.model import SMTC
from smtc.pipelines.views import prepare_frames
from smtc.progress import track

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer]

GRIDS = ((2, 2), (2, 4), (3, 3), (4, 4))
CLUSTERS = (4, 6, 8)


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
    points = features.movedim(1, -1).flatten(0, 2).double().numpy()
    nearest = torch.from_numpy(_kmeans(points, clusters, seed)).view(count, rows, columns)
    masks = torch.nn.functional.one_hot(nearest, clusters).movedim(-1, 1).float()
    return label_frames(masks, size)


def _kmeans(points: NDArray[np.float64], clusters: int, seed: int) -> NDArray[np.int64]:
    """The best of three runs, by the distance within clusters."""
    best, least = np.zeros(len(points), np.int64), np.inf
    for start in range(3):
        with warnings.catch_warnings():
            # Fewer distinct points than clusters: some stay empty, which is harmless here.
            warnings.simplefilter("ignore")
            generator = np.random.default_rng([seed, start])
            centres, labels = kmeans2(points, clusters, minit="++", seed=generator)
        spread = ((points - centres[labels]) ** 2).sum()
        if spread < least:
            best, least = labels.astype(np.int64), spread
    return best


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
    inputs = prepare_frames(frames, model.config.resolution)
    with evaluating(model):
        features, grid = model.encode(inputs[None].to(next(model.parameters()).device))
    return features[0].float().cpu().transpose(1, 2).unflatten(-1, grid)
