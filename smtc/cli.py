"""The command line: `smtc <command> …`. A mistake ends in one sentence and exit code 2."""

import contextlib
import difflib
import io
import json
import logging
import os
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from smtc import presets
from smtc.config import Config, from_dict, to_dict
from smtc.errors import UserError
from smtc.progress import BesideBars

Settings = TypeVar("Settings")

_SHORT_NAMES = {"--data": "--data.root"}


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
class _Synthesize:
    """Write synthetic videos of textured moving objects with exact masks, in the DAVIS layout."""

    folder: tyro.conf.Positional[Path]
    videos: int = 256
    frames: int = 8
    size: int = 96
    """Pixels on a side."""
    seed: int = 0
    difficulty: Literal["standard", "instances", "hard"] = "standard"
    """standard: categories differ; instances: several of one category, occluding; hard: also
    changing light and a fast camera."""


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """Turn a DINO, MoCo or SMTC authors' checkpoint into a model folder of ours."""

    file: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class _Bench:
    output: Path
    """The folder for the results."""
    ops: tuple[str, ...] = ()
    """Operations of smtc.kernels; all when not given."""


@dataclass(frozen=True, kw_only=True)
class _BenchParity(_Bench):
    """Compare every operation, forward and backward, with the oracle in float64.

    Prints the worst errors, writes parity.json, exits with 1 after a miss.
    """

    impl: Literal["auto", "eager", "triton"] = "auto"
    """auto: the Triton kernels where they can run, else plain torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchKernels(_Bench):
    """Time every operation, forward, backward and both, for each provider.

    Prints tables and writes kernels.json. What fails its parity check is not timed.
    """

    sizes: tuple[int, ...] = ()
    """Positions L; 256 1024 1500 when not given, on a CPU 64 256."""
    providers: tuple[str, ...] = ()
    """Of triton, eager-bf16, eager-fp32, compile, plain, scipy, pot; all that can run here when
    not given."""
    clips: int | None = None
    """Clips a batch; 32 when not given, on a CPU 1."""
    seconds: float = 0.2
    """How long to repeat a call, about."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchTune(_Bench):
    """Search for faster launch options on a GPU and print rows for kernels/tuning.py."""

    sizes: tuple[int, ...] = ()
    """Positions L; 256 1024 1500 when not given."""
    clips: int | None = None
    """Clips a batch; 32 when not given."""
    seconds: float = 0.05
    """How long to repeat a candidate, about."""


@dataclass(frozen=True, kw_only=True)
class _BenchStatic(_Bench):
    """Compile every kernel for GPUs that are not here and hold it against its budget."""

    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
    """Of sm_80, sm_90, sm_100."""


@dataclass(frozen=True, kw_only=True)
class _BenchReport:
    """Print a benchmark folder's results as tables; write report.md and kernels.png there."""

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


def _parse(kind: type[Settings], command: str, arguments: list[str], **options: Any) -> Settings:
    """Typed settings from flags; what is wrong with them becomes one sentence."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=f"smtc {command}", args=arguments, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_unboxed(box.getvalue())) from None


def _unboxed(text: str) -> str:
    """The words of the frame that tyro draws around an error, on one line."""
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    return words.removeprefix("Value error ").removeprefix("Unrecognized options ")


def parse_config(arguments: list[str]) -> Config:
    """The config of `smtc train`'s arguments: a preset, then a TOML file, then flags."""
    preset, arguments = _take("--preset", arguments)
    file, arguments = _take("--config", arguments)
    changes = {} if file is None else _read_toml(Path(file))
    in_file = changes.pop("preset", "fixed")
    default = presets.get(str(in_file if preset is None else preset))
    default = from_dict(Config, _overlay(to_dict(default), changes))
    arguments = [_long_name(argument) for argument in arguments]
    description = (
        "Train on a folder of videos, or go on with the run in the output folder.\n\n"
        f"--preset NAME starts from a preset ({', '.join(presets.PRESETS)}; fixed when not given) "
        "and --config FILE.toml changes it; the flags below win over both. "
        "--data DIR is short for --data.root DIR."
    )
    return _parse(Config, "train", arguments, description=description, default=default)


def _take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `flag` and the other arguments; the flag may be written `--flag=value`."""
    value, others, waiting = None, [], False
    for argument in arguments:
        if waiting:
            value, waiting = argument, False
        elif argument == flag:
            waiting = True
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
        else:
            others.append(argument)
    if waiting:
        raise UserError(f"{flag} needs a value.")
    return value, others


def _long_name(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return _SHORT_NAMES.get(name, name) + equals + value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = _underscored(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"The settings file {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The settings file {path} is no valid TOML: {error}.") from error
    if isinstance(values.get("data"), str):  # the short name, as on the command line
        values["data"] = {"root": values["data"]}
    return values


def _underscored(values: dict[str, Any]) -> dict[str, Any]:
    """Keys may be written as on the command line, with dashes."""
    return {
        key.replace("-", "_"): _underscored(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _overlay(merged[key], value)
        else:
            merged[key] = value
    return merged


def _train(arguments: list[str]) -> None:
    """train on a folder of videos"""
    config = parse_config(arguments)
    from smtc.training.trainer import train

    run = train(config)
    print(f"The run is in {run.folder}, its model in {run.model_folder}.")


def _segment(arguments: list[str]) -> None:
    """masks, scores and an overlay of a video"""
    settings = _parse(_Segment, "segment", arguments)
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
    settings = _parse(_Discovery, "evaluate discovery", arguments)
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


def _data_synthesize(arguments: list[str]) -> None:
    """write synthetic videos with masks"""
    settings = _parse(_Synthesize, "data synthesize", arguments)
    from smtc.pipelines.synthetic import synthesize

    synthesize(
        settings.folder,
        videos=settings.videos,
        frames=settings.frames,
        size=settings.size,
        seed=settings.seed,
        difficulty=settings.difficulty,
    )
    print(f"{settings.videos} videos are in {settings.folder}.")


def _bench_kernels(arguments: list[str]) -> None:
    """time the operations against plain torch and peers"""
    settings = _parse(_BenchKernels, "bench kernels", arguments)
    from smtc.benchmarks import kernels

    sys.exit(kernels.run(**vars(settings)))


def _bench_parity(arguments: list[str]) -> None:
    """errors of the operations against float64"""
    settings = _parse(_BenchParity, "bench parity", arguments)
    from smtc.benchmarks import parity

    sys.exit(parity.run(**vars(settings)))


def _bench_static(arguments: list[str]) -> None:
    """registers and memory of the kernels on GPUs that are not here"""
    settings = _parse(_BenchStatic, "bench static", arguments)
    from smtc.benchmarks import static

    sys.exit(static.run(**vars(settings)))


def _bench_tune(arguments: list[str]) -> None:
    """search for faster launch options on a GPU"""
    settings = _parse(_BenchTune, "bench tune", arguments)
    from smtc.benchmarks import tune

    sys.exit(tune.run(**vars(settings)))


def _bench_report(arguments: list[str]) -> None:
    """a benchmark folder as tables and a picture"""
    settings = _parse(_BenchReport, "bench report", arguments)
    from smtc.benchmarks import report

    sys.exit(report.run(settings.folder))


def _convert(arguments: list[str]) -> None:
    """a DINO, MoCo or authors' checkpoint to a model folder"""
    settings = _parse(_Convert, "convert", arguments)
    from smtc.weights import convert

    print(convert(settings.file, settings.folder))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "segment": _segment,
    "evaluate discovery": _evaluate_discovery,
    "data synthesize": _data_synthesize,
    "convert": _convert,
    "bench kernels": _bench_kernels,
    "bench parity": _bench_parity,
    "bench static": _bench_static,
    "bench tune": _bench_tune,
    "bench report": _bench_report,
}
_STOPPED = {
    "train": "smtc: stopped. The same command goes on from its last checkpoint, if any.",
    "bench": "smtc: stopped. What was finished is in the --output folder.",
}
_GROUPS = {
    "evaluate": ("discovery",),
    "data": ("synthesize",),
    "bench": ("kernels", "parity", "static", "tune", "report"),
}
