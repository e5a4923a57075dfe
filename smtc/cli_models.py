"""Commands on models: each one's flags and what it calls."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smtc.cli_parsing import parse


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """Turn a DINO, MoCo or SMTC authors' checkpoint into a model folder of ours.

    For example: smtc convert dino_deitsmall16_pretrain.pth dino_small
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The public file."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A new or empty folder, or a model folder to replace."""


@dataclass(frozen=True, kw_only=True)
class _Export:
    """Write a trained model as one file that runs without this package, checked against the model.

    For example: smtc export runs/tiny exported --height 96 --width 160

    The file takes clips of four frames, RGB in [0, 1], and gives soft masks and scores; config.json
    beside it says the rest. Exits with 1, and leaves nothing, when it differs from the model.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a model folder, a .safetensors file or the authors' .pth."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where model.pt2, model.onnx and config.json go; an earlier export there is replaced."""
    height: int | None = None
    """Of the frames, a multiple of the patch; that of training when not given."""
    width: int | None = None
    format: Literal["torch", "onnx", "both"] = "torch"
    """torch: model.pt2 for torch.export.load; onnx: model.onnx, which needs smtc[onnx]."""
    iterations: int | None = None
    """Of slot attention; the model's own when not given."""


def _convert(arguments: list[str]) -> None:
    """a DINO, MoCo or authors' checkpoint to a model folder"""
    settings = parse(_Convert, "convert", arguments)
    from smtc.weights import convert

    print(convert(settings.file, settings.folder))


def _export(arguments: list[str]) -> None:
    """a model as one file that runs without smtc"""
    settings = parse(_Export, "export", arguments)
    from smtc.export import ParityError, export

    try:
        exported = export(
            settings.checkpoint,
            settings.folder,
            height=settings.height,
            width=settings.width,
            iterations=settings.iterations,
            form=settings.format,
        )
    except ParityError as error:
        print(f"smtc: {error}", file=sys.stderr)
        sys.exit(1)
    print(exported)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "convert": _convert,
    "export": _export,
}
