"""What DALI is to make of each step: clips whose files look whole, and how to augment them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.cache import PackedFrames
from smtc.pipelines.clips import Clip, ClipSampler, Schedule
from smtc.pipelines.dali import Content, Inputs, path_bytes, undecodable, view_inputs
from smtc.pipelines.faults import first_readable
from smtc.pipelines.frames import FileFrames, Frames, Pixels
from smtc.pipelines.images import BadFrame, check_image, read_image
from smtc.pipelines.views import draw_views

_GPU_SHARE = 4  # `cache_memory="auto"` takes up to one part in so many of the free GPU memory


@dataclass(frozen=True)
class Plan:
    """A step as it is fed to the graph, and what went wrong with files on the way."""

    step: int
    clips: list[Clip]
    inputs: Inputs
    """Without the frames when these lie in the GPU's memory."""
    spatial: Tensor | None
    bad: list[tuple[str, str]]
    """Path and message of the files that had clips replaced."""
    replaced: int
    complete: bool = True
    """False when a clip has no readable replacement."""

    def samples(self) -> list[tuple[str, Inputs]]:
        """The file that each sample is decoded from, and what is fed of it to the decoder."""
        files: list[str] = []
        for clip in self.clips:
            files += clip.paths if clip.video.container is None else (clip.video.container,)
        fed = {name: self.inputs[name] for name in ("paths", "positions") if name in self.inputs}
        return [
            (file, {name: [data[number]] for name, data in fed.items()})
            for number, file in enumerate(files)
        ]


class Planner:
    """Step to plan, for any thread: waiting for a disk should not hold up the training."""

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        sampler: ClipSampler,
        *,
        device: torch.device,
        known_bad: Mapping[str, str],
        packed: PackedFrames | None,
    ) -> None:
        self._config, self._schedule, self._sampler = config, schedule, sampler
        self._device, self._packed = device, packed
        self._known_bad = dict(known_bad)
        self._frames: Frames = packed or FileFrames(self._known_bad)
        self.content = self._choose()

    def _choose(self) -> Content:
        on_gpu = self._device.type == "cuda"
        if self._packed is not None:
            return "gpu_frames" if on_gpu and self._belongs_on_gpu(self._packed) else "frames"
        if self._sampler.videos[0].container is None:
            return "images"
        return "videos" if on_gpu else "frames"

    def _belongs_on_gpu(self, packed: PackedFrames) -> bool:
        if self._config.cache_memory != "auto":
            return self._config.cache_memory == "gpu"
        return packed.total_bytes * _GPU_SHARE <= torch.cuda.mem_get_info(self._device)[0]

    def plan(self, step: int) -> Plan:
        """What the graph is to do for `step`. Raises what reading packed frames does."""
        clips: list[Clip] = []
        contents: list[Any] = []
        bad: list[tuple[str, str]] = []
        replaced = 0
        indices = self._schedule.samples(step)
        for index in indices:
            found, errors = first_readable(self._sampler, index, self._read)
            bad += [(error.path, str(error)) for error in errors]
            if found is None:
                return Plan(step, clips, {}, None, bad, replaced, complete=False)
            clips.append(found[0])
            contents.append(found[1])
            replaced += bool(errors)
        views = [draw_views(self._config, self._sampler.seed, index) for index in indices]
        spatial = None
        if self._config.spatial == "independent":
            where = [[[*view.crop, float(view.flip)] for view in pair] for pair in views]
            spatial = torch.tensor(where, dtype=torch.float32)
        repeat = self._config.frames if self.content == "images" else 1
        inputs = self._inputs(contents) | view_inputs(self._config, views, repeat)
        return Plan(step, clips, inputs, spatial, bad, replaced)

    def _read(self, clip: Clip) -> Any:
        """What is fed of a clip; `BadFrame` when a file of it is known or seen to be bad."""
        if self.content == "frames":
            return _one_array(clip, self._frames.read(clip))
        if self._packed is not None:
            return self._packed.refuse_bad(clip)
        container = clip.video.container
        for path in clip.paths if container is None else (container,):
            if path in self._known_bad:
                raise BadFrame(path, self._known_bad[path])
        if container is not None:
            _check_container(container)
            return path_bytes(container), np.array(clip.frames, np.int32)
        for path in clip.paths:
            check_image(path)
        return [path_bytes(path) for path in clip.paths]

    def _inputs(self, contents: list[Any]) -> Inputs:
        if self.content == "images":
            return {"paths": [path for paths in contents for path in paths]}
        if self.content == "videos":
            paths, positions = zip(*contents, strict=True)
            return {"paths": list(paths), "positions": list(positions)}
        return {"frames": contents} if self.content == "frames" else {}

    def find_bad_files(self, plans: Sequence[Plan]) -> bool:
        """Whether DALI fails to decode files of `plans`; new plans will know and avoid them."""
        if self.content not in ("images", "videos"):
            return False
        samples = [sample for plan in plans for sample in plan.samples()]
        failed = undecodable(
            self._config, self.content, [inputs for _, inputs in samples], self._device
        )
        if self.content == "videos":
            clips = [clip for plan in plans for clip in plan.clips]
            return self._find_bad_videos([clips[number] for number in failed])
        found = {samples[number][0]: self._why(samples[number][0]) for number in failed}
        if len(failed) == len(samples):  # then it may well be DALI that is broken
            found = {file: reason for file, reason in found.items() if reason is not None}
        self._known_bad |= {
            file: reason or "it cannot be decoded" for file, reason in found.items()
        }
        return bool(found)

    def _find_bad_videos(self, clips: Sequence[Clip]) -> bool:
        """Whether files of `clips` are bad; `UserError` where only DALI cannot decode them."""
        for clip in clips:
            try:
                FileFrames(self._known_bad).read(clip)
            except BadFrame as error:
                self._known_bad[error.path] = error.reason
            else:
                raise UserError(
                    f"DALI cannot decode {clip.video.container}, which is whole; use --data.loader "
                    "torch, or pack the frames with `smtc data pack`."
                )
        return bool(clips)

    def _why(self, path: str) -> str | None:
        """Why an image cannot be read, if it is not only DALI that cannot."""
        try:
            read_image(path)
        except BadFrame as error:
            return error.reason
        return None


def _one_array(clip: Clip, frames: Sequence[Pixels] | Pixels) -> Pixels:
    if isinstance(frames, np.ndarray):
        return np.ascontiguousarray(frames)
    if len({frame.shape for frame in frames}) > 1:
        path = clip.video.container or clip.paths[0]
        raise BadFrame(path, "its frames differ in size, which DALI cannot take")
    return np.stack(frames)


def _check_container(path: str) -> None:
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise BadFrame(path, "the file is missing") from None
    except OSError as error:
        raise BadFrame(path, f"it cannot be read ({error.strerror})") from None
    if empty:
        raise BadFrame(path, "the file is empty")
