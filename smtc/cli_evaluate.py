"""`smtc evaluate …`: each command's flags and what it calls."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smtc import presets
from smtc.cli_parsing import parse
from smtc.errors import UserError


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


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "evaluate discovery": _evaluate_discovery,
}
