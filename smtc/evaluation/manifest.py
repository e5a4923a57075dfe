"""What a result was made from: enough to make it again, or to see why two results differ."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smtc.errors import UserError

_PACKAGES = ("smtc", "torch", "numpy", "scipy", "opencv-python-headless", "Pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that scores depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit that the package is checked out at (`-dirty` after changes); None elsewhere."""
    here = Path(__file__).resolve()
    # A virtual environment may lie inside the checkout of some other project.
    tracked = _git(here, "ls-files", "--error-unmatch", here.name)
    return tracked and _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(here: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def files_hash(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names under `root` and the contents of `files`, whatever their order."""
    whole = hashlib.sha256()
    for path in sorted(files):
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); complete the copy."
            ) from error
        whole.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of a model's tensors."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        held = tensor.detach().cpu().contiguous()
        whole.update(f"{name} {held.dtype} {tuple(held.shape)}\n".encode())
        whole.update(held.flatten().view(torch.uint8).numpy().tobytes() if held.numel() else b"")
    return whole.hexdigest()


def build_manifest(
    *, root: Path, files: Iterable[Path], protocol: str, **others: Any
) -> dict[str, Any]:
    """The manifest of one result as plain JSON values: what it is, of which data, by which code."""
    files = list(files)
    return {
        "protocol": protocol,
        "data": {"root": str(root), "files": len(files), "sha256": files_hash(root, files)},
        **others,
        "versions": versions(),
        "commit": commit(),
    }
