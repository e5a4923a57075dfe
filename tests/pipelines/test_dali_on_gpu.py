"""DALI on a GPU: the same views, handed over in the order of the stream without a wait."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smtc.config import AugmentConfig, DataConfig
from smtc.pipelines.clips import Clip, ClipSampler, Schedule, find_videos
from smtc.pipelines.dali import DaliViews, obstacle, path_bytes, view_inputs
from smtc.pipelines.dali_loader import DaliLoader
from smtc.pipelines.faults import Faults
from smtc.pipelines.images import read_image
from smtc.pipelines.views import IMAGENET_STD, ViewParameters, apply_view, draw_views

pytestmark = pytest.mark.skipif(obstacle("cuda") is not None, reason=str(obstacle("cuda")))

AUGMENT = AugmentConfig(
    crop=(0.4, 1), flip=0.5, grayscale=0.2, jitter_chance=0.8, blur=0.5, blur_sigma=(0.1, 2.0)
)
# In levels of a pixel, at most and on average, as in test_dali_graph.py.
FRAMES = (3, 0.3)
DECODED = (40, 2)
"""nvJPEG has another inverse cosine transform; colour changes stretch what it differs by."""


def loader(root: Path, device: str = "cuda", **settings: Any) -> DaliLoader:
    own = {name: settings.pop(name) for name in ("dtype", "packed") if name in settings}
    steps = settings.pop("steps", 4)
    config = DataConfig(root=str(root), **{"augment": AUGMENT, **settings})
    sampler = ClipSampler(find_videos(root), frames=4, gap=4, random_gap=False, seed=2)
    schedule = Schedule(batch=3, steps=steps)
    return DaliLoader(
        *(config, schedule, sampler, Faults(config)), size=(32, 32), device=device, **own
    )


def levels(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The greatest and the mean difference."""
    scale = torch.tensor(IMAGENET_STD)[:, None, None] * 255
    difference = (one.cpu().float() - other.cpu().float()).abs() * scale
    return float(difference.max()), float(difference.mean())


def within(found: tuple[float, float], tolerance: tuple[float, float]) -> bool:
    return found[0] <= tolerance[0] and found[1] <= tolerance[1]


@pytest.mark.parametrize("spatial", ["shared", "independent"])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_decoded_frames_make_the_views_of_views(davis2016: Path, spatial: Any, resize: Any) -> None:
    folders = sorted((davis2016 / "JPEGImages" / "480p").iterdir())[:3]
    clips = [np.stack([read_image(folder / f"{i:05d}.jpg") for i in (0, 5)]) for folder in folders]
    config = DataConfig(spatial=spatial, resize=resize, augment=AUGMENT)
    views = [draw_views(config, 0, number) for number in range(3)]
    for content, fed in (
        ("frames", clips),
        ("gpu_frames", [torch.from_numpy(clip).cuda() for clip in clips]),
    ):
        device = torch.device("cuda")
        graph = DaliViews(
            *(config, content),  # type: ignore[arg-type]
            size=(96, 112),
            samples=3,
            device=device,
            depth=1,
        )
        graph.start([{"frames": fed} | view_inputs(config, views)])
        out = torch.empty(3, 2, 2, 3, 96, 112, device=device)
        graph.take(out)
        expected = np.array(
            [
                [apply_view(clip, view, (96, 112), resize=config.resize) for view in pair]
                for clip, pair in zip(clips, views, strict=True)
            ]
        )
        assert within(levels(out, torch.from_numpy(expected)), FRAMES)


@pytest.mark.parametrize("roi_decode", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_files_are_decoded_alike(davis2016: Path, roi_decode: bool, share: float) -> None:
    folder = davis2016 / "JPEGImages" / "480p" / "camel"
    paths = [str(folder / f"{i:05d}.jpg") for i in (0, 5)]
    config = DataConfig(
        roi_decode=roi_decode, hardware_decoder=share, augment=AugmentConfig(crop=(0.2, 1))
    )
    view = ViewParameters(crop=(0.125, 0.25, 0.5, 0.5))
    device = torch.device("cuda")
    graph = DaliViews(config, "images", size=(240, 427), samples=2, device=device, depth=1)
    inputs = {"paths": [path_bytes(path) for path in paths]}
    graph.start([inputs | view_inputs(config, [(view, view)], 2)])
    out = torch.empty(1, 2, 2, 3, 240, 427, device=device)
    graph.take(out)
    expected = apply_view([read_image(path) for path in paths], view, (240, 427))
    assert within(levels(out[0, 0], torch.from_numpy(expected)), DECODED)


def test_batches_are_those_of_the_cpu(videos: Path) -> None:
    for one, other in zip(loader(videos), loader(videos, "cpu"), strict=True):
        assert one.views.is_cuda and one.index.is_cuda
        assert one.sources == other.sources
        assert torch.equal(one.index.cpu(), other.index)
        assert within(levels(one.views, other.views), DECODED)


def test_one_tensor_serves_all_batches(videos: Path) -> None:
    data = loader(videos, dtype=torch.bfloat16, spatial="independent")
    batches = list(data)
    assert len({batch.views.data_ptr() for batch in batches}) == 1
    assert batches[0].views.dtype == torch.bfloat16
    assert batches[0].spatial is not None and batches[0].spatial.is_cuda


def test_a_batch_is_whole_while_the_next_ones_are_made(videos: Path) -> None:
    """The stream is kept busy, so that DALI runs ahead of the copies as far as it can."""
    wanted = [batch.views.clone() for batch in loader(videos, steps=12)]
    torch.cuda.synchronize()
    found = []
    for batch in loader(videos, steps=12, prefetch=3):
        found.append(batch.views.clone())
        torch.cuda._sleep(20_000_000)
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_the_host_does_not_wait(videos: Path) -> None:
    data = iter(loader(videos, steps=8))
    next(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            next(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Packed:
    """Frames that were decoded before, of all videos."""

    def __init__(self, root: Path) -> None:
        self.videos = find_videos(root)
        self.total_bytes = 1

    def arrays(self) -> Any:
        for video in self.videos:
            yield video.name, np.stack([read_image(path) for path in video.frames])

    def read(self, clip: Clip) -> np.ndarray:
        return np.stack([read_image(path) for path in clip.paths])

    def refuse_bad(self, clip: Clip) -> None:
        pass


def test_packed_frames_may_wait_in_either_memory(videos: Path) -> None:
    host, gpu, auto, cpu = (
        list(
            batch.views.clone()
            for batch in loader(videos, device, packed=Packed(videos), cache_memory=memory)
        )
        for device, memory in (("cuda", "host"), ("cuda", "gpu"), ("cuda", "auto"), ("cpu", "host"))
    )
    for one, other, third, fourth in zip(host, gpu, auto, cpu, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
        assert within(levels(one, fourth), FRAMES)


def test_closing_frees_the_gpus_memory(videos: Path) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    data = loader(videos, packed=Packed(videos), cache_memory="gpu")
    next(iter(data))
    assert torch.cuda.memory_allocated() > before
    data.close()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
