"""`smtc segment`: its flags and what it calls."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smtc.cli_parsing import parse
from smtc.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Find the objects of a video and write masks, scores and an overlay.

    For example: smtc segment holiday.mp4 --checkpoint runs/mine --output found/holiday

    The output folder gets masks/VIDEO/00000.png … (palette PNGs of the frames' size; 0 is
    background and an object keeps its id), scores.json and overlay.mp4. Videos may be of any length
    and size; the same command gives the same bytes.
    """

    video: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")]
    """A video file, a folder of JPEG or PNG frames, or one such image."""
    checkpoint: Path
    """A run folder, a model folder, a .safetensors file or the authors' .pth."""
    output: Path
    """Where masks/, scores.json and overlay.mp4 go."""
    preset: Literal["default", "official"] = "default"
    """official: the authors' multi-object script (480x800 frames, 5 iterations, overlapping)."""
    maps: Literal["instance", "semantic"] = "instance"
    """semantic: the semantic slot of each pixel instead of objects."""
    score: float | None = None
    """The least cosine of an object's slot and its semantic slot, -1 to 1; the preset's (0.5) when
    not given."""
    area: float | None = None
    """The least share of the frame that an object covers, 0 to 1; the preset's (0.001) when not
    given."""
    max_objects: int | None = None
    """The most objects of a frame, and ids of the video (1 to 255); the largest are kept."""
    resolution: tuple[int, int] | None = None
    """Height and width that the model sees, multiples of its patch; the preset's when not given."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: half precision."""
    seed: int = 0
    """Of the noise that instance slots start from."""
    fps: float | None = None
    """Of the overlay; the video's, or 10, when not given."""
    viewer: bool = False
    """Also write viewer.html, a page to look at the result in a browser."""
    batch: int = 4
    """Windows of four frames that the model sees at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def _segment(arguments: list[str]) -> None:
    """masks, scores and an overlay of a video"""
    flags = parse(_Segment, "segment", arguments)
    from smtc.inference import PRESETS
    from smtc.pipelines.frame_source import open_source
    from smtc.segment_video import segment_video
    from smtc.training.trainer import pick_device
    from smtc.weights import load_model

    chosen: dict[str, Any] = {
        "similarity": flags.score,
        "min_object": flags.area,
        "max_objects": flags.max_objects,
        "size": flags.resolution,
    }
    settings = dataclasses.replace(
        PRESETS[flags.preset],
        precision=flags.precision,
        seed=flags.seed,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("smtc segment is the work of one process; start it without torchrun.")
    video = open_source(flags.video)
    if flags.output.resolve() in (flags.video.resolve(), *flags.video.resolve().parents):
        raise UserError(f"The output {flags.output} would replace the video; choose another.")
    model = load_model(flags.checkpoint).to(pick_device(flags.device))
    found = segment_video(
        model,
        video,
        flags.output,
        preset=settings,
        maps=flags.maps,
        rate=flags.fps,
        viewer=flags.viewer,
        batch=flags.batch,
    )
    what = _count(len(found.objects), "object") if flags.maps == "instance" else "Semantic maps"
    print(f"{what} in {_count(found.frames, 'frame')}: masks, scores, overlay in {flags.output}.")
    if model.config.backbone.architecture == "vit_tiny":
        print("This is a tiny model: it only knows the kind of videos that it was trained on.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "segment": _segment,
}
