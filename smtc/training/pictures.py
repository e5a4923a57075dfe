"""What the model sees in a training clip, as a picture for TensorBoard."""

import torch
from torch import Tensor

from smtc.inference import PRESETS, predict, render
from smtc.model import SMTC
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD
from smtc.visualize import Pixels, clip_sheet

_IDS = 255  # what a map of instances can tell apart


def mask_picture(model: SMTC, clip: Tensor) -> Pixels | None:
    """Frames, semantic and instance maps of `clip [T,3,H,W]` (normalised), RGB uint8; the maps are
    those that `smtc segment` would find.

    None for a model with more instance slots than a map has ids. Waits for the device, and leaves
    the model as it was.
    """
    if model.config.slots * model.config.instances > _IDS:
        return None
    frames = _as_pixels(clip)
    prediction = predict(model, frames)
    size = frames.shape[1:3]
    found = [render(prediction, index, size, PRESETS["default"]) for index in range(len(frames))]
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
