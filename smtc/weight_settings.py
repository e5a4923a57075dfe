"""Weights that were made with other settings than a run has, told as the flags to give."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smtc.config import BackboneConfig, ModelConfig, from_dict
from smtc.errors import UserError

# The settings that decide which tensors there are, of what shape, and what they mean.
_OF_MODEL = ("slots", "instances", "fusion_head", "update", "embedding")
_OF_ENCODER = ("architecture", "patch", "position_embedding", "neck")


def check_settings(file: Path, config: ModelConfig) -> None:
    """Refuse the weights in `file` where they were made with another N, P, grid or architecture.

    Looked up in the `config.json` beside them; without one only their shapes can tell.
    """
    made = _made_with(file.with_name("config.json"))
    if made is None:
        return
    differing = list(_differing(made, config))
    if not differing:
        return
    told = [f"{name} {was} (the flags say {now})" for name, was, now in differing]
    flags = [f"--{name} {was}" for name, was, _ in differing]
    raise UserError(
        f"{file} was made with {', '.join(told)}; give {' '.join(flags)}, or other weights."
    )


def shapes_told(name: str, given: tuple[int, ...] | str, wanted: tuple[int, ...]) -> str | None:
    """The setting that a tensor of another shape (or type) speaks of, where it is one."""
    if isinstance(given, str) or len(given) != len(wanted):
        return None
    if name == "slot_attention.slots_mu" and given[1] != wanted[1]:
        return f"it was made with model.slots {given[1]}, not {wanted[1]}"
    if name == "transport_proj.weight" and given[1] != wanted[1]:
        return (
            f"it was made for a grid of {given[1]} positions, not {wanted[1]} "
            "(model.resolution over model.backbone.patch)"
        )
    return None


def _made_with(file: Path) -> ModelConfig | BackboneConfig | None:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["kind"] == "model":
            return from_dict(ModelConfig, settings["model"])
        return from_dict(BackboneConfig, settings["backbone"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differing(
    made: ModelConfig | BackboneConfig, config: ModelConfig
) -> Iterator[tuple[str, str, str]]:
    """Flag, value that the weights were made with, value of `config`."""
    encoder = made
    if isinstance(made, ModelConfig):
        encoder = made.backbone
        if made.grid != config.grid and made.resolution != config.resolution:
            yield "model.resolution", _shown(made.resolution), _shown(config.resolution)
        yield from _fields("model.", made, config, _OF_MODEL)
    yield from _fields("model.backbone.", encoder, config.backbone, _OF_ENCODER)


def _fields(
    prefix: str, made: Any, config: Any, names: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    for name in names:
        was, now = getattr(made, name), getattr(config, name)
        if was != now:
            yield prefix + name.replace("_", "-"), _shown(was), _shown(now)


def _shown(value: Any) -> str:
    """As a flag takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
