"""Clips decoded and augmented by OpenCV in worker processes: the loader that runs anywhere."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Batch, Source
from smtc.pipelines.clips import Clip, ClipSampler, find_videos, shard
from smtc.pipelines.images import BadFrame, read_image
from smtc.pipelines.views import apply_view, draw_views

_LOG = logging.getLogger("smtc")
_ATTEMPTS = 100  # replacements tried for one clip
_JUDGED_FROM = 20  # clips drawn before the share of bad ones means something


@dataclass(frozen=True)
class _Made:
    """What a worker hands over: a batch and what went wrong on the way, or no batch and why."""

    batch: Batch | None
    bad: list[tuple[str, str]] = field(default_factory=list)  # path, message
    replaced: int = 0

    def pin_memory(self) -> "_Made":
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class _Batches(Dataset[_Made]):
    """Step to batch; runs in the workers."""

    def __init__(
        self,
        sampler: ClipSampler,
        config: DataConfig,
        size: tuple[int, int],
        batch: int,
        rank: int,
        world: int,
    ) -> None:
        self.sampler, self.config, self.size = sampler, config, size
        self.batch, self.rank, self.world = batch, rank, world

    def __getitem__(self, step: int) -> _Made:
        indices = shard(step, self.batch, self.rank, self.world)
        views = torch.empty(self.batch, 2, self.config.frames, 3, *self.size)
        spatial = torch.empty(self.batch, 2, 5) if self.config.spatial == "independent" else None
        sources: list[Source] = []
        bad: list[tuple[str, str]] = []
        replaced = 0
        for position, index in enumerate(indices):
            clip, frames, errors = _readable_clip(self.sampler, index)
            bad += [(error.path, str(error)) for error in errors]
            if clip is None:
                return _Made(None, bad, replaced)
            replaced += bool(errors)
            for number, view in enumerate(draw_views(self.config, self.sampler.seed, index)):
                apply_view(
                    frames,
                    view,
                    self.size,
                    resize=self.config.resize,
                    blur_kernel=self.config.augment.blur_kernel,
                    out=views[position, number].numpy(),
                )
                if spatial is not None:
                    spatial[position, number] = torch.tensor([*view.crop, float(view.flip)])
            sources.append(Source(clip.video.name, clip.paths, clip.start, clip.gap))
        return _Made(Batch(views, sources, torch.tensor(indices), spatial), bad, replaced)


def _readable_clip(sampler: ClipSampler, index: int) -> tuple[Clip | None, list, list[BadFrame]]:
    """The clip of `index` or its first replacement that can be read, its frames, the errors met."""
    errors: list[BadFrame] = []
    for attempt in range(_ATTEMPTS + 1):
        clip = sampler.clip(index, attempt)
        try:
            return clip, [read_image(path) for path in clip.paths], errors
        except BadFrame as error:
            errors.append(error)
    return None, [], errors


class TorchLoader:
    """The batches of steps `start_step` to `steps` - 1, the same whatever the number of workers.

    `size` is (H, W) of the views, `batch` the clips of one rank and step. A clip with an unreadable
    file is replaced by another one; each such file is reported once. `UserError`: no videos, none
    long enough, no readable clip, or more than `config.max_bad_share` of the clips replaced.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        size: tuple[int, int],
        batch: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if config.root is None:
            raise UserError("No data given; name a folder of videos with --data.")
        self.config, self.batch = config, batch
        sampler = ClipSampler(
            find_videos(config.root),
            frames=config.frames,
            gap=config.gap,
            random_gap=config.random_gap,
            seed=seed,
        )
        self._steps = range(start_step, max(start_step, steps))
        self._loader = DataLoader(
            _Batches(sampler, config, size, batch, rank, world),
            batch_size=None,
            sampler=self._steps,
            num_workers=config.workers,
            worker_init_fn=_prepare_worker,
            pin_memory=torch.cuda.is_available(),
        )
        self._running: Iterator[_Made] | None = None
        self.drawn = 0
        """Clips delivered."""
        self.replaced = 0
        """How many of them took the place of a clip with an unreadable file."""
        self.bad_files: dict[str, str] = {}
        """Path to message of the unreadable files met."""

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """Start at `start_step`; an earlier iteration that was left midway ends."""
        self.close()
        self._running = iter(self._loader)
        return self

    def __next__(self) -> Batch:
        if self._running is None:
            raise StopIteration
        made = next(self._running, None)
        if made is None:
            self.close()
            self._judge(at_end=True)
            raise StopIteration
        for path, message in made.bad:
            if path not in self.bad_files:
                self.bad_files[path] = message
                _LOG.warning("%s", message)
        if made.batch is None:
            self.close()
            raise UserError(
                f"No readable clip was found in {_ATTEMPTS} attempts ({made.bad[-1][1]}); "
                f"check the files under {self.config.root}."
            )
        self.drawn += self.batch
        self.replaced += made.replaced
        self._judge()
        return made.batch

    def close(self) -> None:
        """End the worker processes."""
        self._running = None  # the last reference: torch's iterator stops its workers as it goes

    def _judge(self, *, at_end: bool = False) -> None:
        if self.drawn < _JUDGED_FROM and not at_end:
            return
        if self.replaced <= self.config.max_bad_share * self.drawn:
            return
        self.close()
        raise UserError(
            f"{self.replaced / self.drawn:.0%} of the clips drawn had unreadable files, more than "
            f"data.max-bad-share ({self.config.max_bad_share:.0%}) allows; one is "
            f"{next(iter(self.bad_files.values()))}. Mend or remove such files, or raise the limit."
        )


def _prepare_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
