"""Which loader a run uses, and what all of them have in common."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Batch
from smtc.pipelines.cache import PackedFrames, Unpacked, open_packed
from smtc.pipelines.clips import ClipSampler, Schedule, Video, find_videos
from smtc.pipelines.dali import obstacle
from smtc.pipelines.dali_loader import DaliLoader
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.manifest import MANIFEST, load_manifest
from smtc.pipelines.places import cache_folder
from smtc.pipelines.torch_loader import TorchLoader

_LOG = logging.getLogger("smtc")


class Loader(Protocol):
    """Batches of a schedule's steps. Iterating starts at its first step, each time anew."""

    faults: Faults

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """End its processes and threads."""


def build_loader(
    config: DataConfig,
    schedule: Schedule,
    *,
    size: tuple[int, int],
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    bad_file_log: Path | None = None,
) -> Loader:
    """The loader that `config.loader` names, for views of `size` (H, W); what was chosen is logged.

    Batches come in `dtype`; those of DALI lie on `device`, the others in page-locked memory where
    there is CUDA. Bad files are recorded in `bad_file_log`. `UserError`: no data, no usable videos,
    or a loader that cannot run here.
    """
    if config.root is None:
        raise UserError("Which videos should be loaded? Give --data FOLDER.")
    device = torch.device(device)
    folder = cache_folder(config.root, config.cache)
    manifest = load_manifest(folder, config.root)
    timestamps = None if manifest is None else manifest.timestamps()
    videos = find_videos(config.root, containers=True, timestamps=timestamps)
    sampler = ClipSampler(
        videos,
        frames=config.frames,
        gap=config.gap,
        random_gap=config.random_gap,
        seed=seed,
    )
    if schedule.world > len(sampler.videos):
        raise UserError(
            f"There are {schedule.world} processes for {len(sampler.videos)} usable videos in "
            f"{config.root}, and each process needs one of its own; start at most "
            f"{len(sampler.videos)} processes (torchrun --nproc-per-node) or give more videos."
        )
    known_bad = {} if manifest is None else manifest.known_bad(sampler.videos)
    if known_bad:
        _LOG.info("Known to be broken and not read: %d (smtc data inspect).", len(known_bad))
    if mixed := [] if manifest is None else manifest.of_mixed_sizes():
        names = ", ".join(mixed[:5]) + (", …" if len(mixed) > 5 else "")
        _LOG.warning("Frames that differ in size are resized one by one: %s.", names)
    faults = Faults(config, bad_file_log)
    packed = _open_packed(config, folder, sampler.videos, size, known_bad)
    by_dali = _by_dali(config, device)
    kind = "image files" if sampler.videos[0].container is None else "video files"
    source = f"{kind} decoded each time" if packed is None else "packed frames"
    _LOG.info("Clips from %s, augmented by %s.", source, "DALI" if by_dali else "OpenCV")
    if by_dali:
        if manifest is None and packed is None and sampler.videos[0].container is None:
            _LOG.info(
                "DALI can die of damaged files: run `smtc data inspect %s` once, and training "
                "leaves out what it finds.",
                config.root,
            )
        return DaliLoader(
            *(config, schedule, sampler, faults),
            size=size,
            device=device,
            dtype=dtype,
            known_bad=known_bad,
            packed=packed,
        )
    frames = packed or FileFrames(known_bad)
    return TorchLoader(config, schedule, sampler, frames, faults, size=size, dtype=dtype)


def _open_packed(
    config: DataConfig,
    folder: Path,
    videos: Sequence[Video],
    size: tuple[int, int],
    known_bad: Mapping[str, str],
) -> PackedFrames | None:
    """The packed frames: "cache" has to have them, "auto" takes them where they serve."""
    if config.loader not in ("auto", "cache"):
        return None
    try:
        return open_packed(folder, videos, config, size, known_bad=known_bad)
    except UserError as error:
        if config.loader == "cache":
            raise
        if config.cache is not None and not (folder / MANIFEST).exists():
            raise UserError(
                f"--data.cache {config.cache} holds neither packed frames nor a manifest; name the "
                "folder that was the --output of `smtc data pack` or `smtc data inspect`."
            ) from None
        if not isinstance(error, Unpacked):
            _LOG.warning("The packed frames are not used: %s", error)
        return None


def _by_dali(config: DataConfig, device: torch.device) -> bool:
    """Whether DALI augments: "dali" insists on it, "auto" and "cache" take it on a GPU."""
    if config.loader == "torch" or (config.loader != "dali" and device.type != "cuda"):
        return False
    missing = obstacle(device)
    if missing is not None and config.loader == "dali":
        raise UserError(f"{missing}; use --data.loader torch.")
    if missing is not None:
        _LOG.warning("%s, so the CPU decodes and augments, which may be slower.", missing)
    return missing is None
