"""What the model sees in a training clip, as a picture for TensorBoard."""

import torch
from torch import Tensor

from smtc.inference import PRESETS, predict, segment_prediction
from smtc.model import SMTC
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD
from smtc.visualize import Pixels, clip_sheet


def mask_picture(model: SMTC, clip: Tensor) -> Pixels:
    """Frames, semantic and instance maps of `clip [T,3,H,W]` (normalised), RGB uint8; the maps are
    those that `smtc segment` would find.

    Waits for the device, and leaves the model as it was.
    """
    frames = _as_pixels(clip)
    prediction = predict(model, frames)
    size = frames.shape[1:3]
    found = list(segment_prediction(prediction, size, PRESETS["default"]))
    return clip_sheet(
        list(frames),
        [frame.semantic for frame in found],
        [frame.mask for frame in found],
        background=prediction.background,
    )


def _as_pixels(clip: Tensor) -> Pixels:
    """Normalised frames `[T,3,H,W]` as RGB uint8 `[T,H,W,3]`."""
    channels_last = clip.detach().float().cpu().movedim(-3, -1)
    shown = channels_last * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    return (255 * shown.clamp(0, 1)).round().to(torch.uint8).numpy()
