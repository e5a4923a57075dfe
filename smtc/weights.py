"""Loading and saving weights.

A model folder of ours holds `model.safetensors` and `config.json`. Every tensor of a file is used,
or named in the report as left out with the reason, or named in an error.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from smtc import presets
from smtc.backbones import HEADS, VIT_SIZES, Encoder, build_encoder
from smtc.config import BackboneConfig, ModelConfig, from_dict, to_dict
from smtc.downloads import resolve_weights
from smtc.errors import UserError
from smtc.model import SMTC
from smtc.public_weights import PUBLISHED
from smtc.weight_files import (
    MODEL_FILE,
    RESNET_MARK,
    VIT_MARK,
    Report,
    Source,
    model_file,
    read_checkpoint,
    read_source,
)
from smtc.weight_settings import check_settings, shapes_told

__all__ = [
    "Report",
    "checkpoint_hash",
    "convert",
    "load_encoder",
    "load_encoder_weights",
    "load_init",
    "load_into",
    "load_model",
    "read_checkpoint",
    "save_encoder",
    "save_model",
]

FORMAT = 1
"""Version of the model folder, raised when older programs can no longer read it."""
CONFIG_FILE = "config.json"
PARTIAL = ".partial"


def load_model(path: str | Path, **overrides: Any) -> SMTC:
    """A trained model, in eval mode on the CPU.

    `path` is a run folder, a model folder, a .safetensors file of ours, or the authors' .pth, which
    gets the model settings of the preset `official_v2`. `overrides` are fields of `ModelConfig`.
    Raises `UserError` where the file or an override does not fit.
    """
    source = _read(path)
    if not source.is_smtc:
        raise UserError(
            f"{source.file} holds an encoder only ({source.kind}); train SMTC on it "
            "with --init (ours) or --model.backbone.weights (public files)."
        )
    config = _read_config(source.file.parent) if source.ours else presets.official_v2().model
    # How the training run computed is no property of the model: it may be used on another device.
    config = dataclasses.replace(config, impl="auto", attention="sdpa")
    model = SMTC(_override(config, overrides))
    load_into(model, source.tensors, source.file)
    return model.eval()


def _read(path: str | Path) -> Source:
    """`read_source`, but a checkpoint that training resumes from is called by its name."""
    try:
        return read_source(path)
    except UserError as error:
        file = Path(path)
        resumes = file.parent.name == "checkpoints" and file.match("step_*")
        if not resumes or not file.exists():
            raise
        raise UserError(
            f"{file} is what training resumes from, not a model; "
            f"name the run folder {file.parent.parent} instead."
        ) from error


def load_into(model: nn.Module, state: Mapping[str, Any], where: str | Path) -> None:
    """Load `state` strictly; `where` names its file.

    Raises `UserError` with the first tensor that is missing, unknown or of another shape.
    """
    _check(model.state_dict(), state, where)
    model.load_state_dict(state)


def load_encoder_weights(encoder: Encoder, path: str | Path) -> Report:
    """Start `encoder` from a DINO, MoCo or authors' file, from weights of ours, or from public ones
    by their name (a text: "dino", "moco"), which are downloaded unless they are there.

    The neck and the ResNet's projection stay as they are where the file has none; everything else
    of the encoder must be there. What is no part of the encoder is left out and reported.
    """
    source = _read(resolve_weights(path, encoder.config))
    source = source.without(lambda name: not name.startswith("encoder."), "not the encoder")
    if encoder.config.position_embedding == "none":
        source = source.without(lambda n: n == "encoder.pos_embed", "position_embedding is none")
    if encoder.config.neck == 0:
        source = source.without(lambda n: n.startswith("encoder.neck."), "the encoder has no neck")
    state = {name.removeprefix("encoder."): tensor for name, tensor in source.tensors.items()}
    absent = tuple(head for head in HEADS if not any(name.startswith(head) for name in state))
    return _adopt(encoder, source, state, absent)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder alone of a file or name that `load_encoder_weights` takes, in eval mode on the
    CPU.

    Its settings stand beside weights of ours and follow from the name or the shapes of public
    ones. A head that the file lacks (the projection of a MoCo file) is drawn from a fixed seed.
    """
    named = next((known for known in PUBLISHED if known.name == path), None)
    if named is not None:
        config = _public_backbone(named.architecture, named.patch)
    else:
        config = _encoder_config(_read(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(config)
    load_encoder_weights(encoder, path)
    return encoder.eval()


def _encoder_config(source: Source) -> BackboneConfig:
    if source.ours:
        return _read_backbone(source.file.parent)
    if source.is_smtc:
        return presets.official_v2().model.backbone
    return _detect_backbone(source)


def load_init(model: SMTC, path: str | Path) -> Report:
    """Start `model` from a run folder, a model folder or a .safetensors file of ours (`--init`).

    The file must hold the whole encoder, neck included, and of the rest all or nothing. Only the
    ResNet's projection may be missing alone, since a converted MoCo file has none.
    """
    source = _read(path)
    if not source.ours:
        raise UserError(
            f"{source.file} is no file of ours, which --init expects; turn it into one with "
            "`smtc convert`, or give an encoder to --model.backbone.weights."
        )
    check_settings(source.file, model.config)
    absent = {name.partition(".")[0] + "." for name in model.state_dict()} - {"encoder."}
    if any(not name.startswith("encoder.") for name in source.tensors):
        absent = set()
    if not any(name.startswith("encoder.project.") for name in source.tensors):
        absent.add("encoder.project.")
    return _adopt(model, source, source.tensors, tuple(absent))


def _adopt(
    model: nn.Module, source: Source, state: dict[str, Tensor], absent: tuple[str, ...]
) -> Report:
    """Load all of `model` but the names that start with one of `absent`."""
    expected = model.state_dict()
    initial = [name for name in expected if name.startswith(absent)]
    _check({n: t for n, t in expected.items() if n not in initial}, state, source.file)
    model.load_state_dict(state, strict=False)
    return source.report(initial)


def _check(expected: Mapping[str, Tensor], state: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a `state` whose names and shapes are not exactly the expected ones."""
    given = {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in state.items()
    }
    shapes = [n for n in expected if n in given and given[n] != tuple(expected[n].shape)]
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    told = (shapes_told(n, given[n], tuple(expected[n].shape)) for n in shapes)
    faults = [fault for fault in told if fault is not None]
    if shapes:
        wanted = tuple(expected[shapes[0]].shape)
        faults.append(f"{shapes[0]} is {given[shapes[0]]} instead of {wanted}{_more(shapes)}")
    if missing:
        faults.append(f"{missing[0]} is missing{_more(missing)}")
    if unknown:
        faults.append(f"{unknown[0]} has no place in it{_more(unknown)}")
    if faults:
        raise UserError(
            f"{where} does not fit this model of {len(expected)} tensors: {'; '.join(faults)}. "
            "Use the model settings that it was made with."
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read_config(folder: Path) -> ModelConfig:
    settings = _read_settings(folder)
    if settings.get("kind") != "model":
        raise UserError(
            f"{folder / CONFIG_FILE} does not describe an SMTC model; give a model folder of ours."
        )
    return from_dict(ModelConfig, settings.get("model", {}), "model.")


def _read_backbone(folder: Path) -> BackboneConfig:
    """The encoder's settings in the folder of a whole model or of an encoder alone."""
    settings = _read_settings(folder)
    if settings.get("kind") == "encoder":
        return from_dict(BackboneConfig, settings.get("backbone", {}), "backbone.")
    return _read_config(folder).backbone


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"There is no {CONFIG_FILE} beside the weights in {folder}; copy the whole folder."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or cannot be read; copy the folder again.") from error
    if not isinstance(settings, dict) or "kind" not in settings:
        raise UserError(f"{file} does not describe an SMTC model; give a model folder of ours.")
    if settings.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {settings.get('format')}, this version reads {FORMAT}; update smtc."
        )
    return settings


def _override(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    values = to_dict(config)
    for name, value in overrides.items():
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(values)}."
            raise UserError(f"There is no model setting {name!r}; {hint}")
        values[name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return from_dict(ModelConfig, values, "model.")


def convert(path: str | Path, folder: str | Path) -> Report:
    """Turn a DINO, MoCo or authors' file into a model folder of ours.

    DINO and MoCo give an encoder alone, for `--init` and `--model.backbone.weights`; the authors'
    file gives a whole model. Architecture and patch are read from the shapes.
    """
    source = _read(path)
    if source.ours:
        raise UserError(f"{source.file} is in our format already; use it as it is.")
    settings: dict[str, Any]
    with torch.device("meta"):
        if source.is_smtc:
            config = presets.official_v2().model
            expected = SMTC(config).state_dict()
            settings = {"kind": "model", "model": to_dict(config)}
        else:
            backbone = _detect_backbone(source)
            trunk = build_encoder(backbone).state_dict()
            expected = {f"encoder.{n}": t for n, t in trunk.items() if not n.startswith(HEADS)}
            settings = {"kind": "encoder", "backbone": to_dict(backbone)}
    _check(expected, source.tensors, source.file)
    _write(Path(folder), source.tensors, settings)
    return source.report(written=Path(folder))


def _detect_backbone(source: Source) -> BackboneConfig:
    """The settings that an encoder's shapes speak of."""
    if RESNET_MARK in source.tensors:
        return _public_backbone("resnet50", 16)
    width, _, _, patch = source.tensors[VIT_MARK].shape
    depth = len({n.split(".")[2] for n in source.tensors if n.startswith("encoder.blocks.")})
    if (width, depth) == (VIT_SIZES["vit_small"].width, VIT_SIZES["vit_small"].depth):
        return _public_backbone("vit_small", patch)
    raise UserError(
        f"{source.file} is a ViT of width {width} with {depth} blocks; only ViT-S "
        "(width 384, 12 blocks) is known here."
    )


def _public_backbone(architecture: str, patch: int) -> BackboneConfig:
    if architecture == "resnet50":
        return BackboneConfig(architecture="resnet50", feature="tokens")
    return BackboneConfig(architecture="vit_small", patch=patch)


def save_model(model: SMTC, folder: str | Path) -> None:
    """Write a whole model to `folder`, which is made, empty, or a model folder of ours.

    Its settings go along without the path of the weights it started from. Raises `UserError` where
    the folder holds something else or cannot be written.
    """
    backbone = dataclasses.replace(model.config.backbone, weights=None)
    config = dataclasses.replace(model.config, backbone=backbone)
    _write(Path(folder), model.state_dict(), {"kind": "model", "model": to_dict(config)})


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Write an encoder alone to `folder`, for `load_init` and `load_encoder_weights`."""
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    backbone = dataclasses.replace(encoder.config, weights=None)
    _write(Path(folder), tensors, {"kind": "encoder", "backbone": to_dict(backbone)})


def checkpoint_hash(path: str | Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the weights in a file or folder."""
    file = model_file(Path(path))
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the path.") from error


def _write(folder: Path, tensors: Mapping[str, Tensor], settings: dict[str, Any]) -> None:
    """Write a model folder; both files are complete before either gets its name."""
    was_there = folder.exists()
    _open_folder(folder)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **settings}, indent=2) + "\n"
    targets = folder / MODEL_FILE, folder / CONFIG_FILE
    partials = [target.with_name(target.name + PARTIAL) for target in targets]
    try:
        safetensors.torch.save_file(held, partials[0])
        partials[1].write_text(text, encoding="utf-8")
        # safetensors makes files that their owner alone may read.
        partials[0].chmod(stat.S_IMODE(partials[1].stat().st_mode))
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The model could not be written to {folder} ({error}); free some space or choose "
            "another folder."
        ) from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
        if not was_there:
            with suppress(OSError):  # it holds the model
                folder.rmdir()


def _open_folder(folder: Path) -> None:
    """Make `folder`; refuse one with anything in it but a model of ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {file.name for file in folder.iterdir() if file.suffix != PARTIAL}
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be made or read ({error.strerror}); choose another."
        ) from error
    strangers = names if not _is_model_folder(folder) else names - {MODEL_FILE, CONFIG_FILE}
    if strangers:
        raise UserError(
            f"{folder} holds something else ({min(strangers)}); choose an empty or new folder."
        )


def _is_model_folder(folder: Path) -> bool:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and {"format", "kind"} <= settings.keys()
