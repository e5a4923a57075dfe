"""Reading weights: what a file is, its tensors under our names, and a report of what went where.

Known are our own folders and the public files of DINO, MoCo and the authors. An encoder's tensors
get names that start with `encoder.`, whatever the file calls them.
"""

import argparse
import dataclasses
import pickle
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from smtc.errors import UserError

MODEL_FILE = "model.safetensors"
VIT_MARK = "encoder.patch_embed.proj.weight"
RESNET_MARK = "encoder.layer4.0.conv1.weight"
SMTC_MARK = "slot_attention.slots_mu"

# What a damaged pickle or archive makes torch.load raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    SafetensorError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)

# Where public files keep their tensors, and what stands beside them.
_CONTAINERS = {
    "model_state_dict": "training state",
    "teacher": "training state; the teacher's encoder is taken",
    "state_dict": "training state",
}
_ENCODER_PREFIXES = ("module.encoder_q.", "module.backbone.", "backbone.")
_PROJECTION_HEADS = ("fc.", "head.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What went where when a file was read; `str()` is made for reading."""

    source: str
    """The file and what it turned out to be."""
    loaded: dict[str, str]
    """Our name of every tensor that was taken, and the file's."""
    values: int
    """Numbers in those tensors."""
    left_out: dict[str, str]
    """What of the file was not taken, and why."""
    initial: tuple[str, ...] = ()
    """Tensors of the model that the file does not hold, left as they were."""
    written: Path | None = None
    """The folder that was written."""

    def __str__(self) -> str:
        lines = [f"{self.source}: {_count(len(self.loaded))} taken, {self.values:,} values"]
        groups = Counter(_group(ours, theirs) for ours, theirs in self.loaded.items())
        for (theirs, ours), number in groups.items():
            lines.append(f"  {theirs} -> {ours} ({_count(number)})")
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"  left out ({reason}): {_some(names)}")
        if self.initial:
            lines.append(f"  not in the file, left as initialised: {_some(self.initial)}")
        if self.written is not None:
            lines.append(f"  written to {self.written}")
        return "\n".join(lines)


def _group(ours: str, theirs: str) -> tuple[str, str]:
    """The part of the network that a tensor belongs to, by the file's name and by ours."""
    start = len("encoder.") if ours.startswith("encoder.") else 0
    part, _, rest = ours[start:].partition(".")
    return theirs.removesuffix(f".{rest}"), ours[:start] + part


def _count(number: int) -> str:
    return f"{number} tensor" + "s" * (number != 1)


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file's tensors under our names, and what it is."""

    file: Path
    kind: str
    """For people: "SMTC", "ResNet-50", "ViT, patch 16"."""
    ours: bool
    """In our own format."""
    tensors: dict[str, Tensor]
    names: dict[str, str]
    """Our name of each tensor to the file's."""
    left_out: dict[str, str]

    @property
    def is_smtc(self) -> bool:
        """A whole model, not an encoder alone."""
        return SMTC_MARK in self.tensors

    def report(self, initial: Iterable[str] = (), written: Path | None = None) -> Report:
        """What went where, once all `tensors` were taken."""
        return Report(
            source=f"{self.file} ({self.kind})",
            loaded=self.names,
            values=sum(tensor.numel() for tensor in self.tensors.values()),
            left_out=self.left_out,
            initial=tuple(initial),
            written=written,
        )

    def without(self, unwanted: Callable[[str], bool], reason: str) -> "Source":
        """The same with the tensors whose name (ours) is `unwanted` left out for `reason`."""
        dropped = {theirs: reason for ours, theirs in self.names.items() if unwanted(ours)}
        return dataclasses.replace(
            self,
            tensors={name: t for name, t in self.tensors.items() if not unwanted(name)},
            names={name: theirs for name, theirs in self.names.items() if not unwanted(name)},
            left_out=self.left_out | dropped,
        )


def read_source(path: str | Path) -> Source:
    """The weights of a run folder, a model folder, or a file that is ours, DINO's, MoCo's or the
    authors'.

    Raises `UserError` where there is none, or it cannot be read or is of no known kind.
    """
    file = model_file(Path(path))
    content: dict[Any, Any] = read_checkpoint(file)
    left_out: dict[str, str] = {}
    for container, beside in _CONTAINERS.items():
        if isinstance(content.get(container), dict):
            left_out = {str(name): beside for name in content if name != container}
            content = content[container]
            break
    found = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    left_out |= {str(name): "no tensor" for name in content if name not in found}
    smtc_names = any(name.startswith("encoder.") for name in found)
    names = {name: name for name in found} if smtc_names else _encoder_names(found, left_out)
    tensors = {ours: found[theirs] for ours, theirs in names.items()}
    return Source(
        file=file,
        kind=_kind(file, tensors),
        ours=smtc_names and file.suffix == ".safetensors",
        tensors=tensors,
        names=names,
        left_out=left_out,
    )


def _encoder_names(found: Iterable[str], left_out: dict[str, str]) -> dict[str, str]:
    """Our name to the file's for a public encoder file; adds to `left_out` what is no encoder."""
    prefixes = (p for p in _ENCODER_PREFIXES if any(name.startswith(p) for name in found))
    prefix = next(prefixes, "")
    names = {}
    for name in found:
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix):
            left_out[name] = "not the encoder"
        elif bare.startswith(_PROJECTION_HEADS):
            left_out[name] = "projection head"
        else:
            names["encoder." + bare] = name
    return names


def _kind(file: Path, tensors: Mapping[str, Tensor]) -> str:
    if SMTC_MARK in tensors:
        return "SMTC"
    if RESNET_MARK in tensors:
        return "ResNet-50"
    if VIT_MARK in tensors and tensors[VIT_MARK].ndim == 4:
        return f"ViT, patch {tensors[VIT_MARK].shape[-1]}"
    raise UserError(
        f"{file} holds no weights that are known here; give a DINO ViT, a MoCo ResNet-50, "
        "the authors' SMTC or a model of ours."
    )


def model_file(path: Path) -> Path:
    """The file with the weights: of a run folder, of a model folder, or `path` itself."""
    if not path.is_dir():
        return path
    for file in (path / MODEL_FILE, path / "model" / MODEL_FILE):
        if file.exists():
            return file
    if (path / "checkpoints").is_dir() and (path / "config.json").exists():
        raise UserError(
            f"{path} is a run that has not ended: it holds no model/{MODEL_FILE} yet; give its "
            "`smtc train` command again, which goes on to the end."
        )
    raise UserError(
        f"{path} holds no {MODEL_FILE} and no model/{MODEL_FILE}; name a run folder whose training "
        "has ended, a model folder or a file."
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a .safetensors file or one of `torch.save`, on the CPU.

    No code in the file is run. Raises `UserError` where it is missing, damaged or something else.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file or folder {path}; check the path.")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name a file in it.")
    try:
        content = _load(path)
    except _UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors; "
            "save the model's state_dict() instead."
        )
    return content


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        raise UserError(f"{path} is empty; download or copy it again.")
    archive = head == b"PK"
    if not archive and not head.startswith(b"\x80"):
        raise UserError(f"{path} is not a checkpoint; give a file that torch.save wrote.")
    # DINO's full checkpoints hold their command line as a Namespace, which is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _unreadable(path: Path, error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return f"{path} may not be read; check its permissions."
    foreign = re.search(r"unsupported global(?:: global)? (\S+)", str(error), re.IGNORECASE)
    if foreign:
        return (
            f"{path} is damaged or holds a {foreign[1]}, and only tensors and plain values are "
            "loaded, for safety; save its state_dict() alone."
        )
    return (
        f"{path} cannot be read as a checkpoint: it is truncated, damaged or something else; "
        "download or copy it again."
    )
