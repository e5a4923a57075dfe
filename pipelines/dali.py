"""The DALI graph: image files, video files or decoded frames in, the two views of clips out.

One function builds it for a GPU and for a CPU. It follows the definition in views.py and draws
nothing itself: windows, flips, colours and blurs are fed with the frames, as `view_inputs` lays
them out. Two things differ from the straight order of steps, and neither changes a value by more
than rounding does: the flip comes last, where it costs nothing, and what the views share is done
once.

A sample is a frame when frames come from image files, so that one decoder serves all frames of a
batch and those of a clip may differ in size; what arrives decoded, or from a video file, is a
sample a clip, `[T,h,w,3]`. The operators after the decoder work on both. The views leave the graph
as two outputs, because stacking them there would copy them once more.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from smtc.config import AugmentConfig, DataConfig
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD, ViewParameters, blur_width

Content = Literal["images", "videos", "frames", "gpu_frames"]
"""What the graph is fed: paths, paths and positions, or decoded clips in either memory."""
Inputs = dict[str, Any]
"""Name to what is fed for one batch."""


def obstacle(device: torch.device | str) -> str | None:
    """Why DALI cannot run for `device`, as a sentence; None when it can."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.dali"):
            return "DALI is not installed (pip install nvidia-dali-cuda130)"
        return f"DALI cannot be imported ({error})"
    if torch.device(device).type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "DALI finds no CUDA device"
    return _gpu_obstacle(_device_id(torch.device(device)))


@functools.cache
def _gpu_obstacle(device_id: int | None) -> str | None:
    """Why DALI's build and the driver do not get along, found by trying."""
    from nvidia.dali import Pipeline, fn

    try:
        pipe = Pipeline(batch_size=1, num_threads=1, device_id=device_id)
        with pipe:
            pipe.set_outputs(fn.random.uniform(device="gpu", shape=[1]))
        pipe.build()
        pipe.run()
    except RuntimeError as error:
        return f"DALI cannot use this GPU ({str(error).strip().partition(chr(10))[0]})"
    return None


def path_bytes(path: str) -> np.ndarray:
    """A path as the graph takes it."""
    return np.frombuffer(path.encode("utf-8", "surrogateescape"), np.uint8)


def view_inputs(
    config: DataConfig, views: Sequence[tuple[ViewParameters, ViewParameters]], repeat: int = 1
) -> Inputs:
    """The parameters of a batch of clips, as the graph of `config` takes them.

    Those of each clip are repeated `repeat` times, for its frames when these are the samples.
    """
    parts = _Parts(config)
    inputs: Inputs = {}
    for number, column in enumerate(zip(*views, strict=True)):
        if number < parts.places:
            if parts.window:
                corners = [(x, y, x + w, y + h) for x, y, w, h in (view.crop for view in column)]
                inputs[f"window{number}"] = np.array(corners, np.float64)
            if parts.flip:
                inputs[f"flip{number}"] = np.array([view.flip for view in column], np.int32)
        if parts.colour:
            colours = np.stack([view.colour for view in column])
            colours[..., 3] *= 255  # the graph's pixels go up to 255
            inputs[f"colour{number}"] = colours
    inputs = {name: np.repeat(array, repeat, axis=0) for name, array in inputs.items()}
    if parts.blur:
        for number, column in enumerate(zip(*views, strict=True)):
            kernels = [_blur_kernel(view.blur_sigma, config.augment) for view in column]
            inputs[f"blur{number}"] = [kernel for kernel in kernels for _ in range(repeat)]
    return inputs


def _blur_kernel(sigma: float, augment: AugmentConfig) -> np.ndarray:
    """The weights along one axis, `[n,1]`; a single 1 where there is no blur."""
    return cv2.getGaussianKernel(blur_width(sigma, augment.blur_kernel), sigma, cv2.CV_32F)


class DaliViews:
    """A running graph: batches of inputs go in, and their views come out in the same order.

    `depth` batches are on their way at once; `start` takes as many, and then each `take` makes
    room for one `add`. DALI raises `RuntimeError` where a file cannot be decoded, and the graph is
    of no use from then on.
    """

    def __init__(
        self,
        config: DataConfig,
        content: Content,
        *,
        size: tuple[int, int],
        samples: int,
        device: torch.device,
        depth: int,
    ) -> None:
        from nvidia.dali import pipeline_def

        self.depth = depth
        self._device = device
        self._pipe: Any = pipeline_def(_graph, enable_conditionals=True)(
            *(config, content, size, device),
            batch_size=samples,
            num_threads=max(1, config.workers),
            device_id=_device_id(device),
            prefetch_queue_depth=depth,
        )
        self._pipe.build()

    def start(self, batches: Sequence[Inputs]) -> None:
        """Feed the first `depth` batches and set to work on them."""
        for inputs in batches:
            self._feed(inputs)
        self._pipe.schedule_run()  # the first call runs as many as the queue is deep

    def add(self, inputs: Inputs) -> None:
        """Feed another batch and set to work on it."""
        self._feed(inputs)
        self._pipe.schedule_run()

    def take(self, views: Tensor) -> None:
        """Wait for the next batch and write it into `views`, `[B,2,T,3,H,W]` of any dtype.

        On a GPU the host does not wait: the current stream does, and the copy is queued there.
        """
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        for number, output in enumerate(self._pipe.share_outputs(cuda_stream=stream)):
            view = torch.from_dlpack(output.as_tensor())
            views[:, number].copy_(view.view(views[:, number].shape))
        self._pipe.release_outputs()

    def _feed(self, inputs: Inputs) -> None:
        for name, data in inputs.items():
            self._pipe.feed_input(name, data)


def undecodable(
    config: DataConfig, content: Content, samples: Sequence[Inputs], device: torch.device
) -> list[int]:
    """Which of the samples, each the paths (and positions) of one, DALI fails to decode alone."""
    from nvidia.dali import pipeline_def

    failed, pipe = [], None
    for number, inputs in enumerate(samples):
        if pipe is None:  # one that has failed is of no more use
            pipe = pipeline_def(_frames)(
                *(content, config, device),
                batch_size=1,
                num_threads=1,
                device_id=_device_id(device),
                prefetch_queue_depth=1,
            )
        try:
            for name, data in inputs.items():
                pipe.feed_input(name, data)
            pipe.run()
        except RuntimeError:
            failed.append(number)
            pipe = None
    return failed


class _Parts:
    """Which steps the graph has; one that never changes a pixel is left out."""

    def __init__(self, config: DataConfig) -> None:
        augment = config.augment
        self.places = 1 if config.spatial == "shared" else 2
        """How many of the views have a window and a flip of their own."""
        self.window = augment.crop is not None or config.resize == "crop"
        self.flip = augment.flip > 0
        self.colour = augment.grayscale > 0 or augment.jitter_chance > 0
        self.blur = augment.blur > 0


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _graph(
    config: DataConfig, content: Content, size: tuple[int, int], device: torch.device
) -> tuple[Any, ...]:
    """The nodes of both views, `[3,H,W]` of a frame or `[T,3,H,W]` of a clip, float32."""
    from nvidia.dali import fn, types

    parts = _Parts(config)
    layout = "HWC" if content == "images" else "FHWC"
    windows, flips = ([], [])
    for number in range(parts.places):
        if parts.window:
            name = f"window{number}"
            windows.append(fn.external_source(name=name, dtype=types.FLOAT64, ndim=1))
        if parts.flip:
            flips.append(fn.external_source(name=f"flip{number}", dtype=types.INT32, ndim=0))

    if config.roi_decode and content == "images" and parts.window:
        frames = _decode_window(windows[0], config, size, device)
        resized = [_resize(frames, layout, None, config, size)]
    else:
        frames = _frames(content, config, device)
        resized = [_resize(frames, layout, window, config, size) for window in windows or [None]]

    views = []
    for number in (0, 1):
        place = number % parts.places
        views.append(
            fn.crop_mirror_normalize(
                _recolour(resized[place % len(resized)], number, parts, device),
                mean=[255 * mean for mean in IMAGENET_MEAN],
                std=[255 * std for std in IMAGENET_STD],
                mirror=flips[place] if flips else 0,
                output_layout=layout.replace("HWC", "CHW"),
                dtype=types.FLOAT,
            )
        )
    return tuple(views)


def _frames(content: Content, config: DataConfig, device: torch.device) -> Any:
    """Frames of any size, `[h,w,3]` or `[T,h,w,3]` uint8, on the device."""
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    if content == "images":
        return fn.decoders.image(_encoded(), **_decoder_settings(config, device))
    if content == "videos":
        positions = fn.external_source(name="positions", dtype=types.INT32, ndim=1)
        decoder = "mixed" if on_gpu else "cpu"
        # Frames that are not there are an error, and not black.
        return fn.decoders.video(_encoded(), frames=positions, device=decoder, pad_mode="none")
    frames = fn.external_source(
        name="frames",
        layout="FHWC",
        dtype=types.UINT8,
        device="gpu" if content == "gpu_frames" else "cpu",
        # What is in host memory stays there until the batch is out, see the loader.
        no_copy=content == "frames",
    )
    return frames.gpu() if on_gpu and content == "frames" else frames


def _encoded() -> Any:
    """The bytes of the files that are named."""
    from nvidia.dali import fn, types

    paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
    # A map of a file that somebody cuts short meanwhile would end the process.
    return fn.io.file.read(paths, dont_use_mmap=True)


def _decoder_settings(config: DataConfig, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "cpu"}
    return {
        "device": "mixed",
        "hw_decoder_load": config.hardware_decoder,
        "jpeg_fancy_upsampling": True,  # colours between pixels as libjpeg makes them
    }


def _decode_window(
    window: Any, config: DataConfig, size: tuple[int, int], device: torch.device
) -> Any:
    """Frames of which no more is decoded than their window."""
    from nvidia.dali import fn

    encoded = _encoded()
    shape = fn.peek_image_shape(encoded)
    first, extent = _pixel_window((shape[1], shape[0]), window, config, size)
    settings = _decoder_settings(config, device)
    return fn.decoders.image_slice(encoded, start=first, shape=extent, axes=[1, 0], **settings)


def _resize(
    frames: Any, layout: str, window: Any | None, config: DataConfig, size: tuple[int, int]
) -> Any:
    """The window of the frames, or all of them, at the size of the views."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali

    row = layout.index("H")
    whole = frames.shape()
    width, height = whole[row + 1], whole[row]
    first, extent = None, fn.stack(width, height)
    if window is not None:
        first, extent = _pixel_window((width, height), window, config, size)
        # Enlarging, like a filter, would look beyond the window's border.
        if config.antialias or dali.min(extent[0] - size[1], extent[1] - size[0]) < 0:
            frames = fn.slice(frames, start=first, shape=extent, axes=[row + 1, row])
            first = first * 0
    if config.antialias:
        return fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    # It reads no pixels but those it mixes, which makes it twice as fast as fn.resize on a CPU.
    matrix = fn.transforms.scale(
        scale=extent / types.Constant(np.array([size[1], size[0]], np.float32))
    )
    if window is not None:
        matrix = fn.transforms.translation(matrix, offset=fn.cast(first, dtype=types.FLOAT))
    return fn.warp_affine(frames, matrix=matrix, size=size, interp_type=types.INTERP_LINEAR)


def _pixel_window(
    frame: tuple[Any, Any], window: Any, config: DataConfig, size: tuple[int, int]
) -> tuple[Any, Any]:
    """First column and row, and how many: `views.crop_window` step by step, in float64 too."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali

    whole = fn.cast(fn.stack(*frame), dtype=types.FLOAT64)
    corner, inner = 0.0, whole
    if config.resize == "crop":
        scale = dali.min(whole[0] / size[1], whole[1] / size[0])
        inner = fn.stack(size[1] * scale, size[0] * scale)
        corner = (whole - inner) / 2
    first = dali.min(dali.floor(corner + window[0:2] * inner + 0.5), whole - 1)
    extent = dali.max(1, dali.floor(corner + window[2:4] * inner + 0.5) - first)
    return fn.cast(first, dtype=types.INT32), fn.cast(extent, dtype=types.INT32)


def _recolour(pixels: Any, number: int, parts: _Parts, device: torch.device) -> Any:
    """Colour, clamp and blur of view `number`; pixels from 0 to 255."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali

    if parts.colour:
        matrix = fn.external_source(name=f"colour{number}", dtype=types.FLOAT, ndim=2)
        pixels = fn.coord_transform(pixels, MT=matrix, dtype=types.FLOAT)
        pixels = dali.max(dali.min(pixels, 255.0), 0.0)  # three times as fast as dali.clamp
    if parts.blur:
        column = fn.external_source(name=f"blur{number}", dtype=types.FLOAT, ndim=2)
        row = fn.transpose(column, perm=[1, 0])
        if device.type == "cuda":
            column, row = column.gpu(), row.gpu()
        # Along one axis after the other; on a CPU ten times as fast as fn.gaussian_blur.
        pixels = fn.filter(fn.filter(pixels, column, dtype=types.FLOAT), row, dtype=types.FLOAT)
    return pixels
