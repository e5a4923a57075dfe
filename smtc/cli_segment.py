"""`smtc segment`: its flags and what it calls."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from smtc.cli_parsing import parse


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Find the objects of a video and write masks, scores and an overlay."""

    frames: tyro.conf.Positional[Path]
    """A folder of JPEG or PNG frames."""
    checkpoint: Path
    """A run folder, a model folder, a .safetensors file or the authors' .pth."""
    output: Path
    """Where masks/, scores.json and overlay.mp4 go."""
    preset: Literal["default", "official"] = "default"
    """official: the authors' multi-object script (480x800 frames, 5 iterations, overlapping)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def _segment(arguments: list[str]) -> None:
    """masks, scores and an overlay of a video"""
    settings = parse(_Segment, "segment", arguments)
    from smtc.inference import segment_folder
    from smtc.training.trainer import pick_device
    from smtc.weights import load_model

    model = load_model(settings.checkpoint).to(pick_device(settings.device))
    segment_folder(model, settings.frames, settings.output, preset=settings.preset)
    frames = json.loads((settings.output / "scores.json").read_text(encoding="utf-8"))["frames"]
    ids = {name for scores in frames for name in scores}
    print(
        f"{len(ids)} objects in {len(frames)} frames: masks, scores, overlay in {settings.output}."
    )


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "segment": _segment,
}
