"""The command line: `smtc <command> …`. A mistake ends in one sentence and exit code 2."""

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from smtc import cli_bench, cli_data, presets
from smtc.cli_parsing import parse, parse_config
from smtc.errors import UserError
from smtc.progress import BesideBars


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Find the objects of a video and write masks, scores and an overlay."""

    frames: tyro.conf.Positional[Path]
    """A folder of JPEG or PNG frames."""
    checkpoint: Path
    """A run folder, a model folder, a .safetensors file or the authors' .pth."""
    output: Path
    """Where masks/, scores.json and overlay.mp4 go."""
    preset: Literal["ours", "official"] = "ours"
    """official: the authors' multi-object script (480x800 frames, 5 iterations, overlapping)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _Discovery:
    """Score the objects that a model discovers against a data set's masks."""

    data: Path
    """The data set's folder."""
    output: Path
    """Where results.json, results.csv, manifest.json and sheet.png go."""
    dataset: Literal["synthetic", "davis2016"] = "synthetic"
    checkpoint: Path | None = None
    """A run folder, a model folder, a .safetensors file or the authors' .pth."""
    untrained: str | None = None
    """Instead of a checkpoint: the preset whose model, with random weights, is scored."""
    seed: int = 0
    """Of the random weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """Turn a DINO, MoCo or SMTC authors' checkpoint into a model folder of ours."""

    file: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 2 after a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[BesideBars()])
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"smtc: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            _STOPPED.get(next(iter(arguments), ""), "smtc: stopped."),
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`smtc … | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    command, rest = arguments[0], arguments[1:]
    group = _GROUPS.get(command)
    if group is not None:
        if not rest or rest[0] in ("-h", "--help"):
            print(f"smtc {command} " + "|".join(group) + "   (each has --help)")
            return
        command, rest = f"{command} {rest[0]}", rest[1:]
    if command not in _COMMANDS:
        raise UserError(f"There is no command {command!r}; {_nearest(command, list(_COMMANDS))}")
    _COMMANDS[command](rest)


def _overview() -> str:
    lines = ["smtc: self-supervised object-centric learning in video", ""]
    lines += [f"  smtc {name:<22}{run.__doc__}" for name, run in _COMMANDS.items()]
    return "\n".join([*lines, "", "Each command has --help."])


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."


def _train(arguments: list[str]) -> None:
    """train on a folder of videos"""
    config = parse_config(arguments)
    from smtc.training.trainer import train

    run = train(config)
    print(f"The run is in {run.folder}, its model in {run.model_folder}.")


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


def _evaluate_discovery(arguments: list[str]) -> None:
    """score discovered objects against a data set's masks"""
    settings = parse(_Discovery, "evaluate discovery", arguments)
    from smtc.evaluation.discovery import evaluate_discovery

    results = evaluate_discovery(
        _model_to_score(settings),
        settings.dataset,
        settings.data,
        settings.output,
        checkpoint=settings.checkpoint,
        seed=settings.seed if settings.checkpoint is None else None,
    )
    for name, value in results.items():
        if isinstance(value, float):
            print(f"{name:<24}{value:.3f}")
    print(f"Results, manifest and a contact sheet are in {settings.output}.")


def _model_to_score(settings: _Discovery) -> Any:
    import torch

    from smtc.model import SMTC
    from smtc.training.trainer import pick_device
    from smtc.weights import load_model

    if (settings.checkpoint is None) == (settings.untrained is None):
        raise UserError("Give either --checkpoint FILE or --untrained PRESET.")
    device = pick_device(settings.device)
    if settings.checkpoint is not None:
        return load_model(settings.checkpoint).to(device)
    torch.manual_seed(settings.seed)
    return SMTC(presets.get(settings.untrained or "").model).to(device).eval()


def _convert(arguments: list[str]) -> None:
    """a DINO, MoCo or authors' checkpoint to a model folder"""
    settings = parse(_Convert, "convert", arguments)
    from smtc.weights import convert

    print(convert(settings.file, settings.folder))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "segment": _segment,
    "evaluate discovery": _evaluate_discovery,
    **cli_data.COMMANDS,
    "convert": _convert,
    **cli_bench.COMMANDS,
}
_STOPPED = {
    "train": "smtc: stopped. The same command goes on from its last checkpoint, if any.",
    "data": "smtc: stopped. The same command goes on with what is left.",
    "bench": "smtc: stopped. What was finished is in the --output folder.",
}
_GROUPS = {
    group: tuple(name.split()[1] for name in _COMMANDS if name.startswith(group + " "))
    for group in ("evaluate", "data", "bench")
}
