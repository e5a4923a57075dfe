"""What our loaders are measured against: a DataLoader with PIL or OpenCV, as one would write it.

Same clips, crops and flips shared by the views, colour and blur drawn for each view, frame by frame
with the library's own operations: the same work, but not the same pixels as `views.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smtc.config import DataConfig
from smtc.pipelines.clips import ClipSampler
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD

_MEAN, _STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
_ENDLESS = 10**9


@dataclass(frozen=True)
class _Where:
    """What the views of a clip share; shares of the frame."""

    x: float
    y: float
    side: float
    flip: bool


@dataclass(frozen=True)
class _Look:
    """What each view has for itself; None and 0: not applied."""

    jitter: tuple[float, float, float, float] | None
    grey: bool
    sigma: float


def _draw(config: DataConfig, rng: np.random.Generator) -> tuple[_Where, list[_Look]]:
    augment = config.augment
    side = float(np.sqrt(rng.uniform(*(augment.crop or (1.0, 1.0)))))
    x, y = (1 - side) * rng.random(2)
    where = _Where(x, y, side, rng.random() < augment.flip)
    looks = []
    for _ in range(2):
        factors = [rng.uniform(max(0, 1 - s), 1 + s) for s in augment.jitter[:3]]
        hue = rng.uniform(-augment.jitter[3], augment.jitter[3])
        jitter = (factors[0], factors[1], factors[2], hue)
        looks.append(
            _Look(
                jitter if rng.random() < augment.jitter_chance else None,
                rng.random() < augment.grayscale,
                rng.uniform(*augment.blur_sigma) if rng.random() < augment.blur else 0.0,
            )
        )
    return where, looks


def _with_pil(path: str, where: _Where, looks: list[_Look], size: tuple[int, int]) -> list[Tensor]:
    with Image.open(path) as file:
        image = file.convert("RGB")
    left, top = where.x * image.width, where.y * image.height
    box = (left, top, left + where.side * image.width, top + where.side * image.height)
    views = []
    for look in looks:
        view = image.resize(size[::-1], Image.Resampling.BILINEAR, box)
        if where.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if look.grey:
            view = view.convert("L").convert("RGB")
        if look.jitter is not None:
            brightness, contrast, saturation, hue = look.jitter
            view = ImageEnhance.Brightness(view).enhance(brightness)
            view = ImageEnhance.Contrast(view).enhance(contrast)
            view = ImageEnhance.Color(view).enhance(saturation)
            turned, *others = view.convert("HSV").split()
            turned = turned.point([(value + round(255 * hue)) % 256 for value in range(256)])
            view = Image.merge("HSV", (turned, *others)).convert("RGB")
        if look.sigma:
            view = view.filter(ImageFilter.GaussianBlur(look.sigma))
        views.append(_normalised(np.array(view)))
    return views


def _with_opencv(
    path: str, where: _Where, looks: list[_Look], size: tuple[int, int]
) -> list[Tensor]:
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    assert image is not None
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    height, width = image.shape[:2]
    left, top = int(where.x * width), int(where.y * height)
    window = image[top : top + int(where.side * height), left : left + int(where.side * width)]
    views = []
    view: Any
    for look in looks:
        view = cv2.resize(window, size[::-1], interpolation=cv2.INTER_LINEAR)
        if where.flip:
            view = cv2.flip(view, 1)
        if look.grey:
            view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if look.jitter is not None:
            brightness, contrast, saturation, hue = look.jitter
            view = cv2.convertScaleAbs(view, alpha=brightness)
            middle = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
            # Below 0 `convertScaleAbs` would come back positive.
            steps = np.clip(contrast * (np.arange(256) - middle) + middle, 0, 255).astype(np.uint8)
            view = cv2.LUT(view, steps)
            luma = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            view = cv2.addWeighted(view, saturation, luma, 1 - saturation, 0)
            colours = cv2.cvtColor(view, cv2.COLOR_RGB2HSV)
            colours[..., 0] = (colours[..., 0].astype(np.int16) + round(180 * hue)) % 180
            view = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)
        if look.sigma:
            view = cv2.GaussianBlur(view, (0, 0), look.sigma)
        views.append(_normalised(view))
    return views


def _normalised(view: NDArray[np.uint8]) -> Tensor:
    pixels = (view.astype(np.float32) / 255 - _MEAN) / _STD
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


BASELINES: dict[str, Callable[[str, _Where, list[_Look], tuple[int, int]], list[Tensor]]] = {
    "pil": _with_pil,
    "opencv": _with_opencv,
}
"""By provider: a frame's file to its two views `[3,H,W]`."""


class _Clips(Dataset[Tensor]):
    def __init__(
        self, provider: str, sampler: ClipSampler, config: DataConfig, size: tuple[int, int]
    ) -> None:
        self._provider, self._sampler, self._config, self._size = provider, sampler, config, size

    def __getitem__(self, index: int) -> Tensor:
        clip = self._sampler.clip(index)
        where, looks = _draw(self._config, np.random.default_rng([self._sampler.seed, index]))
        load = BASELINES[self._provider]
        frames = [load(path, where, looks, self._size) for path in clip.paths]
        return torch.stack([torch.stack(view) for view in zip(*frames, strict=True)])


class PlainLoader:
    """Batches `[B,2,T,3,H,W]` float32 without end, from `config.workers` processes."""

    def __init__(
        self,
        provider: str,
        sampler: ClipSampler,
        config: DataConfig,
        *,
        clips: int,
        size: tuple[int, int],
    ) -> None:
        self._batches: Iterator[Tensor] | None = iter(
            DataLoader(
                _Clips(provider, sampler, config, size),
                batch_size=clips,
                sampler=range(_ENDLESS),
                num_workers=config.workers,
                prefetch_factor=config.prefetch,
                worker_init_fn=_one_thread,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def __next__(self) -> Tensor:
        assert self._batches is not None
        return next(self._batches)

    def close(self) -> None:
        """End the worker processes."""
        self._batches = None


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
