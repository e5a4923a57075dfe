"""`smtc evaluate …`: each command's flags and what it calls."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from smtc import presets
from smtc.cli_parsing import parse
from smtc.errors import UserError

if TYPE_CHECKING:
    import torch

    from smtc.evaluation.methods import Method


@dataclass(frozen=True, kw_only=True)
class _Discovery:
    """Score the objects that a model, and what it has to beat, discover against true masks.

    For example: smtc evaluate discovery --data DIR --checkpoint RUN --output OUT --baselines all

    The same command goes on where a stopped one was. Under torchrun the processes share the work.
    """

    data: Path
    """The data set's folder."""
    output: Path
    """Where results.json, results.csv, manifest.json and sheet.png go."""
    dataset: Literal["synthetic", "davis2016", "davis2017-unsupervised", "segtrackv2", "fbms59"] = (
        "synthetic"
    )
    checkpoint: Path | None = None
    """A run folder, a model folder, a .safetensors file or the authors' .pth."""
    backbone: str | None = None
    """Instead of a checkpoint: an encoder alone (dino, moco, their files, or ours), whose features
    are clustered."""
    untrained: str | None = None
    """Instead of a checkpoint: the preset whose model, with random weights, is scored."""
    baselines: tuple[str, ...] = ("none",)
    """all, none, or some of: backbone (k-means on the encoder's features), random (the same model
    with random weights), whole-frame (one object), centre-box (half of height and width)."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """Of what is drawn: random weights, the start of k-means, the noise of the instance slots.
    Several give mean ± standard deviation; what draws nothing is scored once."""
    preset: Literal["default", "official"] = "default"
    """official: the authors' multi-object script (480x800 frames, 5 iterations, overlapping)."""
    resolution: tuple[int, int] | None = None
    """Height and width that the model sees, multiples of its patch; the preset's or the model's own
    (an encoder alone: 256x256) when not given."""
    clusters: int = 4
    """Of k-means."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16: autocast; slots and softmax stay in fp32."""
    penguin: bool = False
    """segtrackv2: all objects of the sequence penguin count, not the first alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def _evaluate_discovery(arguments: list[str]) -> None:
    """score discovered objects against a data set's masks"""
    settings = parse(_Discovery, "evaluate discovery", arguments)
    from smtc.evaluation.discovery import Evaluation, evaluate
    from smtc.evaluation.results import results_table
    from smtc.evaluation.shared_work import one_voice
    from smtc.training.distributed import joined
    from smtc.training.trainer import pick_device

    with joined(pick_device(settings.device)) as world, one_voice(world):
        evaluation = Evaluation(
            methods=_methods(settings, world.device),
            dataset=settings.dataset,
            root=settings.data,
            output=settings.output,
            seeds=settings.seeds,
            penguin=settings.penguin,
        )
        results = evaluate(evaluation, world)
        if world.main:
            print(results_table(results))
            print(f"Results, manifest and a contact sheet are in {settings.output}.")


def _methods(settings: _Discovery, device: "torch.device") -> "list[Method]":
    from smtc.evaluation import methods
    from smtc.evaluation.discovery import weights_source
    from smtc.inference import PRESETS
    from smtc.weights import load_encoder, load_model

    chosen = dataclasses.replace(PRESETS[settings.preset], precision=settings.precision)
    if settings.resolution is not None:
        chosen = dataclasses.replace(chosen, size=settings.resolution)
    inference = methods.Inference(settings=chosen, clusters=settings.clusters)
    baselines = methods.baseline_names(settings.baselines)
    sources = settings.checkpoint, settings.backbone, settings.untrained
    if sum(source is not None for source in sources) > 1:
        raise UserError("Give only one of --checkpoint, --backbone and --untrained.")
    if settings.checkpoint is not None:
        model = load_model(settings.checkpoint).to(device)
        source = weights_source(settings.checkpoint)
        return methods.model_methods(model, baselines, inference, source)
    if settings.backbone is not None:
        encoder = load_encoder(settings.backbone)
        source = {"path": settings.backbone}
        return methods.encoder_methods(encoder, baselines, inference, source, device)
    if settings.untrained is not None:
        config = presets.get(settings.untrained).model
        return methods.untrained_methods(config, baselines, inference, device)
    return methods.lone_baselines(baselines)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "evaluate discovery": _evaluate_discovery,
}
