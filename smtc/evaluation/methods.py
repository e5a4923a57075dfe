"""What is scored: a model, and what it has to beat. Each says what it sees in a video."""

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from smtc.backbones import Encoder, build_encoder
from smtc.config import ModelConfig, to_dict
from smtc.errors import UserError
from smtc.evaluation.baselines import Encode, cluster_video, encoding, enlarge
from smtc.evaluation.manifest import weights_hash
from smtc.evaluation.metrics import border_label
from smtc.evaluation.protocols import Found, found_in
from smtc.evaluation.videos import EvaluationVideo
from smtc.inference import PRESETS, InferenceSettings, segment_frames
from smtc.model import SMTC
from smtc.pipelines.views import prepare_frames

BASELINES = ("backbone", "random", "whole-frame", "centre-box")
_NEED_A_MODEL = ("backbone", "random")

MODEL, BACKBONE, RANDOM = "model", "backbone alone", "random weights"
WHOLE_FRAME, CENTRE_BOX = "whole frame", "centre box"

_DRAWN_MODELS = 4  # of random weights that stay in memory, one a seed
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Module = TypeVar("Module", bound=nn.Module)
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Inference:
    """What all methods have in common."""

    settings: InferenceSettings = PRESETS["default"]
    clusters: int = 4
    """K, of k-means."""
    batch: int = 8
    """Windows of four frames that a model sees at once."""

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= 255:
            raise UserError(f"clusters is {self.clusters}; give 2 to 255.")


class Method(ABC):
    """Finds objects in videos, without any label."""

    seeded = True
    """Whether anything is drawn."""

    def __init__(self, name: str, switches: dict[str, Any], weights: dict[str, Any] | None) -> None:
        self.name = name
        self.switches = switches
        """What decides, beside weights and seed, what is found: JSON, for the manifest."""
        self.weights = weights
        """Where the weights come from."""

    @abstractmethod
    def find(self, video: EvaluationVideo, size: Size, seed: int) -> Found:
        """What it sees in the annotated frames of `video`, whose height and width are `size`.

        Errors: `UserError` for a frame that cannot be read.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what it finds, but the seed."""
        return {"name": self.name, "switches": self.switches, "weights": self.weights}


class Slots(Method):
    """The slots of SMTC; the noise that its instance slots start from is drawn."""

    def __init__(
        self,
        name: str,
        model: Callable[[int], SMTC],
        config: ModelConfig,
        weights: dict[str, Any],
        inference: Inference,
    ) -> None:
        settings = inference.settings
        if config.slots > 256:
            raise UserError(
                f"{config.slots} semantic slots are more than the 256 that can be scored; give a "
                "model with fewer."
            )
        switches = {
            **dataclasses.asdict(settings),
            "size": list(settings.size or config.resolution),
            "iterations": settings.iterations or config.iterations,
            "frame_interpolation": "bilinear, no antialias, aspect ratio not kept",
            "mask_interpolation": "bilinear, align_corners=False",
            "regions": "argmax of the upsampled masks",
            "objects": "instance slots",
        }
        del switches["seed"]
        super().__init__(name, switches, weights)
        self._model, self._inference = model, inference

    def find(self, video: EvaluationVideo, size: Size, seed: int) -> Found:
        settings = dataclasses.replace(self._inference.settings, seed=seed)
        frames, batch = video.iterate_frames(), self._inference.batch
        seen = segment_frames(self._model(seed), frames, settings=settings, batch=batch)
        return found_in(seen, video.annotated)


class Clusters(Method):
    """K-means on an encoder's features, fitted to each video by itself; its start is drawn.

    Foreground is all but the cluster that holds most of the border. An object is a cluster, so that
    its id persists through the video.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[int], Encode],
        size: Size,
        weights: dict[str, Any],
        inference: Inference,
    ) -> None:
        settings = inference.settings
        switches = {
            "size": list(settings.size or size),
            "mean": settings.mean,
            "std": settings.std,
            "precision": settings.precision,
            "clusters": inference.clusters,
            "frame_interpolation": "bilinear, no antialias, aspect ratio not kept",
            "mask_interpolation": "bilinear, align_corners=False",
            "regions": "k-means on the encoder's features of the video",
            "objects": "clusters but that with most of the border",
        }
        super().__init__(name, switches, weights)
        self._encode, self._inference = encode, inference
        self._size = settings.size or size

    def find(self, video: EvaluationVideo, size: Size, seed: int) -> Found:
        settings, clusters = self._inference.settings, self._inference.clusters

        def frames() -> Iterator[Tensor]:
            for frame in video.iterate_frames():
                yield prepare_frames([frame], self._size, mean=settings.mean, std=settings.std)

        labels = cluster_video(
            frames, len(video.frames), video.annotated, self._encode(seed), clusters, seed=seed
        )
        background = border_label(labels)
        semantic = enlarge(labels, clusters, size)
        ids = np.arange(1, clusters + 1, dtype=np.uint8)
        ids[background] = 0
        return Found(semantic=semantic, instances=ids[semantic], regions=semantic)


class Box(Method):
    """One object in the middle of every frame that takes a `share` of its height and width."""

    seeded = False

    def __init__(self, name: str, share: float) -> None:
        super().__init__(name, {"box": f"the central {share:g} of height and width"}, None)
        self._share = share

    def find(self, video: EvaluationVideo, size: Size, seed: int) -> Found:
        box = np.zeros(size, np.uint8)
        top, left = (round(side * (1 - self._share) / 2) for side in size)
        box[top : size[0] - top, left : size[1] - left] = 1
        boxes = np.broadcast_to(box, (len(video.annotated), *size))
        return Found(semantic=boxes, instances=boxes, regions=boxes)


def model_methods(
    model: SMTC, baselines: Sequence[str], inference: Inference, weights: dict[str, Any]
) -> list[Method]:
    """A trained model and `baselines` (of `BASELINES`); `weights` says where it came from."""
    weights = weights | {"weights_sha256": weights_hash(model)}
    main = Slots(MODEL, lambda _: model, model.config, weights, inference)
    settings, size = inference.settings, model.config.resolution

    def backbone() -> Method:
        encode = in_precision(encoding(model), settings, _device(model))
        return Clusters(BACKBONE, lambda _: encode, size, weights, inference)

    def random() -> Method:
        return _random_slots(model.config, inference, _device(model))

    return [main, *_baselines(baselines, backbone, random)]


def untrained_methods(
    config: ModelConfig, baselines: Sequence[str], inference: Inference, device: torch.device
) -> list[Method]:
    """A model of random weights, each seed's own, and `baselines`."""

    def backbone() -> Method:
        model = _drawn(lambda: SMTC(config), device)

        def encode(seed: int) -> Encode:
            return in_precision(encoding(model(seed)), inference.settings, device)

        weights = {"random": "the seed's", "model": to_dict(config)}
        return Clusters(BACKBONE, encode, config.resolution, weights, inference)

    main = _random_slots(config, inference, device)
    return [main, *_baselines(baselines, backbone, None)]


def encoder_methods(
    encoder: Encoder,
    baselines: Sequence[str],
    inference: Inference,
    weights: dict[str, Any],
    device: torch.device,
) -> list[Method]:
    """K-means on the features of an encoder alone, and `baselines`.

    The encoder sees frames of 256x256 pixels where the inference settings give no size.
    """
    size = ModelConfig().resolution
    settings, config = inference.settings, encoder.config
    weights = weights | {"weights_sha256": weights_hash(encoder)}
    encode = in_precision(_alone(encoder.to(device)), settings, device)
    main = Clusters(BACKBONE, lambda _: encode, size, weights, inference)

    def random() -> Method:
        drawn = _drawn(lambda: build_encoder(config), device)

        def encode(seed: int) -> Encode:
            return in_precision(_alone(drawn(seed)), settings, device)

        weights = {"random": "the seed's", "backbone": to_dict(config)}
        return Clusters(RANDOM, encode, size, weights, inference)

    return [main, *_baselines(baselines, None, random)]


def lone_baselines(baselines: Sequence[str]) -> list[Method]:
    """Those `baselines` that need no model. Errors: `UserError` for one that does, or for none."""
    if not baselines:
        raise UserError(
            "There is nothing to score; give --checkpoint FILE, --backbone FILE, --untrained "
            "PRESET or --baselines whole-frame centre-box."
        )
    for name in baselines:
        if name in _NEED_A_MODEL:
            raise UserError(
                f"The baseline {name} needs a model; give --checkpoint FILE, --backbone FILE or "
                "--untrained PRESET, or name only whole-frame and centre-box."
            )
    return _baselines(baselines, None, None)


def baseline_names(given: Sequence[str]) -> tuple[str, ...]:
    """The baselines that `given` names, in our order; "all" and "none" stand alone.

    Errors: `UserError` for an unknown name, with the nearest.
    """
    if list(given) == ["none"]:
        return ()
    if list(given) == ["all"]:
        return BASELINES
    for name in given:
        if name in ("all", "none"):
            raise UserError(f"--baselines {name} stands alone; leave out the others.")
        if name not in BASELINES:
            near = difflib.get_close_matches(name, (*BASELINES, "all", "none"), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(BASELINES)}."
            raise UserError(f"There is no baseline {name!r}; {hint}")
    return tuple(name for name in BASELINES if name in given)


def _baselines(
    names: Sequence[str],
    backbone: Callable[[], Method] | None,
    random: Callable[[], Method] | None,
) -> list[Method]:
    """The methods of `names`; one whose maker is None is there already."""
    makers = {
        "backbone": backbone,
        "random": random,
        "whole-frame": partial(Box, WHOLE_FRAME, 1.0),
        "centre-box": partial(Box, CENTRE_BOX, 0.5),
    }
    chosen = (makers[name] for name in names)
    return [make() for make in chosen if make is not None]


def _random_slots(config: ModelConfig, inference: Inference, device: torch.device) -> Method:
    weights = {"random": "the seed's", "model": to_dict(config)}
    model = _drawn(lambda: SMTC(config), device)
    return Slots(RANDOM, model, config, weights, inference)


def _drawn(make: Callable[[], Module], device: torch.device) -> Callable[[int], Module]:
    """A function: a seed to what `make` draws from it, in eval mode; some are kept."""

    @lru_cache(maxsize=_DRAWN_MODELS)
    def drawn(seed: int) -> Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().to(device).eval()

    return drawn


def _alone(encoder: Encoder) -> Encode:
    """The features of an encoder in eval mode: float32 on the CPU."""
    device = _device(encoder)

    def encode(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            features = encoder(inputs.to(device)).float().cpu()
        return features.transpose(1, 2).unflatten(-1, encoder.grid(inputs))

    return encode


def in_precision(encode: Encode, settings: InferenceSettings, device: torch.device) -> Encode:
    """`encode` under autocast where the settings ask for 16 bits."""
    dtype = _DTYPES[settings.precision]

    def encoded(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return encode(inputs)

    return encoded


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
