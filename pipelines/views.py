"""The two augmented views of a clip: parameters drawn once, and the OpenCV code that applies them.

Any loader can replay the drawn parameters, a DALI graph too. That is why colour is one affine
matrix: torchvision turns hue in HSV and takes contrast about the mean of the image at hand, which
parameters alone cannot express; here hue is a rotation in YIQ and contrast is about mid-grey.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smtc.config import AugmentConfig, DataConfig
from smtc.pipelines.keyed import Stream, generator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Crop = tuple[float, float, float, float]
Resize = Literal["squash", "crop"]

# In sigmas. What a Gaussian weighs beyond is below float32's precision, and weights that are no
# longer normal numbers would make the blur ten times slower.
_BLUR_REACH = 5.5

_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_FROM_YIQ = np.linalg.inv(_YIQ)


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """One view of a clip, the same for its frames; applied in the order of the fields."""

    crop: Crop = (0.0, 0.0, 1.0, 1.0)
    """x, y, width and height as shares of the frame (after the centred crop of `resize="crop"`)."""
    flip: bool = False
    """Mirrored left to right."""
    colour: NDArray[np.float32] = field(default_factory=lambda: np.eye(3, 4, dtype=np.float32))
    """`[3,4]`: RGB in [0, 1] times the left 3x3, plus the last column, then clamped to [0, 1]."""
    blur_sigma: float = 0.0
    """Of a Gaussian blur, in pixels of the resized frame; 0: none."""


def draw_views(config: DataConfig, seed: int, index: int) -> tuple[ViewParameters, ViewParameters]:
    """The parameters of both views of global sample `index`: a pure function of the arguments.

    Crop and flip are shared by the views unless `config.spatial` is "independent"; colour and blur
    never are. A random crop keeps the frame's aspect ratio.
    """
    shared = config.spatial == "shared"
    first, second = (
        _draw_view(config.augment, seed, index, 0 if shared else view, view) for view in (0, 1)
    )
    return first, second


def _draw_view(
    augment: AugmentConfig, seed: int, index: int, spatial: int, photometric: int
) -> ViewParameters:
    # All numbers are drawn, used or not: switching one part on leaves the others as they are.
    where = generator(seed, Stream.SPATIAL, index, spatial).random(4)
    crop = (0.0, 0.0, 1.0, 1.0)
    if augment.crop is not None:
        least, greatest = augment.crop
        side = math.sqrt(least + (greatest - least) * where[0])
        crop = (float(where[1]) * (1 - side), float(where[2]) * (1 - side), side, side)

    look = generator(seed, Stream.PHOTOMETRIC, index, photometric).random(8)
    factors = None
    if look[1] < augment.jitter_chance:
        strength, neutral = np.array(augment.jitter), np.array([1.0, 1.0, 1.0, 0.0])
        least_factors = np.array([*np.maximum(0, 1 - strength[:3]), -strength[3]])
        factors = least_factors + (neutral + strength - least_factors) * look[2:6]
    low, high = augment.blur_sigma
    return ViewParameters(
        crop=crop,
        flip=bool(where[3] < augment.flip),
        colour=colour_matrix(grey=bool(look[0] < augment.grayscale), jitter=factors),
        blur_sigma=float(low + (high - low) * look[7]) if look[6] < augment.blur else 0.0,
    )


def colour_matrix(
    *, grey: bool = False, jitter: Sequence[float] | NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """The affine map `[3,4]` of RGB in [0, 1]: grey, then brightness, contrast, saturation, hue.

    `jitter` holds the factors of the first three (1: unchanged) and the hue's turn (1: a circle).
    """
    matrix = np.eye(4)
    if grey:
        matrix[:3, :3] = _LUMA
    if jitter is None:
        return matrix[:3].astype(np.float32)
    brightness, contrast, saturation, hue = jitter
    affine = np.eye(4)
    affine[:3, :3] *= brightness * contrast
    affine[:3, 3] = 0.5 * (1 - contrast)
    colourful = np.eye(4)
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    saturate = saturation * np.eye(3) + (1 - saturation) * _LUMA
    colourful[:3, :3] = _FROM_YIQ @ turn @ _YIQ @ saturate
    return (colourful @ affine @ matrix)[:3].astype(np.float32)


def crop_window(
    crop: Crop, frame: tuple[int, int], size: tuple[int, int], resize: Resize
) -> tuple[int, int, int, int]:
    """Top, left, height, width in whole pixels of what a (height, width) frame gives a view."""
    height, width = frame
    top, left = 0.0, 0.0
    inner_height, inner_width = float(height), float(width)
    if resize == "crop":
        scale = min(height / size[0], width / size[1])
        inner_height, inner_width = size[0] * scale, size[1] * scale
        top, left = (height - inner_height) / 2, (width - inner_width) / 2
    x, y, w, h = crop
    first_row = min(_nearest(top + y * inner_height), height - 1)
    first_column = min(_nearest(left + x * inner_width), width - 1)
    rows = max(1, _nearest(top + (y + h) * inner_height) - first_row)
    columns = max(1, _nearest(left + (x + w) * inner_width) - first_column)
    return first_row, first_column, rows, columns


def _nearest(position: float) -> int:
    """The nearest whole number, the greater of two: `round` prefers even ones, DALI cannot."""
    return math.floor(position + 0.5)


def apply_view(
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    view: ViewParameters,
    size: tuple[int, int],
    *,
    resize: Resize = "squash",
    antialias: bool = False,
    blur_kernel: int = 25,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """A view `[T,3,H,W]` of T RGB uint8 frames `[h,w,3]`, which may differ in size.

    Cropped to whole pixels, resized by `resize_frame` to `size` (H, W), flipped, recoloured,
    clamped to [0, 1], blurred with a kernel `blur_kernel` wide (mirrored at the border) and
    normalised by `mean` and `std`; float32, written into `out` when given.
    """
    cut = cut_frames(frames, view, size, resize=resize, antialias=antialias)
    return recolour(cut, view, blur_kernel=blur_kernel, mean=mean, std=std, out=out)


def cut_frames(
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    view: ViewParameters,
    size: tuple[int, int],
    *,
    resize: Resize = "squash",
    antialias: bool = False,
) -> NDArray[np.uint8]:
    """The first half of `apply_view`: cropped, resized and flipped, uint8 `[T,H,W,3]`."""
    cut = np.empty((len(frames), *size, 3), np.uint8)
    for frame, target in zip(frames, cut, strict=True):
        top, left, rows, columns = crop_window(view.crop, frame.shape[:2], size, resize)
        window = frame[top : top + rows, left : left + columns]
        resize_frame(window, size, antialias=antialias, out=target)
        if view.flip:
            cv2.flip(target, 1, dst=target)
    return cut


def recolour(
    cut: NDArray[np.uint8],
    view: ViewParameters,
    *,
    blur_kernel: int = 25,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The second half of `apply_view`: `[T,H,W,3]` from `cut_frames` to the view `[T,3,H,W]`."""
    frames, height, width, _ = cut.shape
    if out is None:
        out = np.empty((frames, 3, height, width), np.float32)
    # Normalising has positive gains, so it may precede the clamp if the bounds are normalised too,
    # and blurring keeps constants, so it may follow: one pass over the pixels instead of three.
    gain, offset = 1 / np.array(std), -np.array(mean) / np.array(std)
    matrix = view.colour * gain[:, None]
    matrix[:, :3] /= 255
    matrix[:, 3] += offset
    least, greatest = offset.astype(np.float32), (offset + gain).astype(np.float32)
    kernel = blur_width(view.blur_sigma, blur_kernel)
    pixels = np.empty((height, width, 3), np.float32)
    # Frame by frame, so that what one pass writes is still in the cache for the next.
    for frame, planes in zip(cut, out, strict=True):
        np.copyto(pixels, frame)
        for channel, plane in enumerate(planes):
            cv2.transform(pixels, matrix[channel : channel + 1], dst=plane)
            np.clip(plane, least[channel], greatest[channel], out=plane)
            if view.blur_sigma > 0:
                cv2.GaussianBlur(plane, (kernel, kernel), view.blur_sigma, dst=plane)
    return out


def blur_width(sigma: float, widest: int) -> int:
    """Pixels across which a Gaussian of `sigma` weighs anything, at most `widest`; odd."""
    return min(widest, 2 * math.ceil(_BLUR_REACH * sigma) + 1)


def resize_frame(
    frame: NDArray[np.uint8],
    size: tuple[int, int],
    *,
    antialias: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """An image `[h,w,3]` resized bilinearly to `size` (H, W), pixel centres at half-integers.

    With `antialias`, what shrinks is filtered by a triangle as wide as the shrinkage (PIL's
    "bilinear"); without, each pixel mixes its four nearest ones (OpenCV's, and the released code).
    """
    if out is None:
        out = np.empty((*size, 3), np.uint8)
    if not antialias:
        cv2.resize(frame, (size[1], size[0]), dst=out, interpolation=cv2.INTER_LINEAR)
        return out
    channels_first = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    resized = F.interpolate(channels_first, size=size, mode="bilinear", antialias=True)
    np.copyto(out, resized[0].permute(1, 2, 0).numpy())
    return out


def prepare_frames(
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    size: tuple[int, int],
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """Frames without augmentation, as evaluation and inference want them.

    RGB uint8 `[T,h,w,3]` to float32 `[T,3,H,W]`, normalised. The whole frame is squashed, whatever
    training did, so that masks cover all of it.
    """
    plain = ViewParameters()
    return torch.from_numpy(apply_view(frames, plain, size, mean=mean, std=std))
