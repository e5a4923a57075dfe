"""The DALI graph does what views.py defines: each step alone, and the chain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from smtc.config import AugmentConfig, DataConfig
from smtc.pipelines.dali import DaliViews, obstacle, path_bytes, undecodable, view_inputs
from smtc.pipelines.images import read_image
from smtc.pipelines.video_files import read_frames, read_timestamps
from smtc.pipelines.views import (
    IMAGENET_STD,
    ViewParameters,
    apply_view,
    colour_matrix,
    draw_views,
)

pytestmark = pytest.mark.skipif(obstacle("cpu") is not None, reason=str(obstacle("cpu")))

# By how many of a pixel's 255 levels DALI and views.py may differ: at most, and on average.
TOLERANCE = {
    # The same libjpeg; PNG is exact. Formats that few use are rounded otherwise.
    "decode": (0, 0),
    "decode cmyk or 16 bits": (1, 1),
    # OpenCV mixes with weights of 11 bits, DALI with float ones.
    "resize": (1, 0.25),
    # PyTorch rounds between the two axes.
    "resize with antialiasing": (1, 0.35),
    # Beyond the border DALI repeats the last pixel, PyTorch gives the others more weight: this
    # concerns a quarter of the weights of the outermost pixels, of noise here.
    "border with antialiasing": (25, 4),
    "flip": (0, 0),
    "colour": (1e-3, 1e-4),
    "blur": (1e-3, 1e-4),
    "normalise": (0, 0),
    # Contrast and saturation stretch what resizing differs by.
    "chain": (3, 0.3),
    "chain with antialiasing": (20, 0.3),
}
EVERYTHING = AugmentConfig(
    crop=(0.3, 0.9), flip=0.5, grayscale=0.2, jitter_chance=0.8, blur=0.5, blur_sigma=(0.1, 2.0)
)
CPU = torch.device("cpu")


def noise(height: int, width: int, frames: int = 2, seed: int = 0) -> NDArray[np.uint8]:
    """Frames in which every pixel differs from its neighbours."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture as a camera takes it, without sharp edges."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def run(
    config: DataConfig,
    clips: Sequence[Any],
    views: Sequence[tuple[ViewParameters, ViewParameters]],
    size: tuple[int, int],
) -> NDArray[np.float32]:
    """The graph's views `[B,2,T,3,H,W]` of clips: lists of image files, or arrays `[T,h,w,3]`."""
    images = not isinstance(clips[0], np.ndarray)
    if images:
        inputs = {"paths": [path_bytes(str(path)) for clip in clips for path in clip]}
    else:
        inputs = {"frames": list(clips)}
    frames = len(clips[0])
    inputs |= view_inputs(config, views, frames if images else 1)
    graph = DaliViews(
        *(config, "images" if images else "frames"),
        size=size,
        samples=len(clips) * (frames if images else 1),
        device=CPU,
        depth=1,
    )
    out = torch.full((len(clips), 2, frames, 3, *size), torch.nan)
    graph.start([inputs])
    graph.take(out)
    return out.numpy()


def expected(
    config: DataConfig,
    clips: Sequence[Any],
    views: Sequence[tuple[ViewParameters, ViewParameters]],
    size: tuple[int, int],
) -> NDArray[np.float32]:
    """The same from views.py."""
    result = []
    for clip, pair in zip(clips, views, strict=True):
        frames = clip if isinstance(clip, np.ndarray) else [read_image(path) for path in clip]
        result.append(
            [
                apply_view(
                    frames,
                    view,
                    size,
                    resize=config.resize,
                    antialias=config.antialias,
                    blur_kernel=config.augment.blur_kernel,
                )
                for view in pair
            ]
        )
    return np.array(result)


def assert_close(one: NDArray[np.float32], other: NDArray[np.float32], stage: str) -> None:
    """Equal to the tolerance of `stage`, in levels of a pixel."""
    levels = np.abs(one.astype(np.float64) - other) * 255 * np.array(IMAGENET_STD)[:, None, None]
    most, mean = TOLERANCE[stage]
    rounding = 1e-4  # of float32, by normalising
    assert levels.max() <= most + rounding
    assert levels.mean() <= mean + rounding


def assert_same_views(
    config: DataConfig,
    clips: Sequence[Any],
    views: Sequence[tuple[ViewParameters, ViewParameters]],
    size: tuple[int, int],
    stage: str,
) -> None:
    got, wanted = run(config, clips, views, size), expected(config, clips, views, size)
    if stage == "resize with antialiasing":
        inside = np.s_[..., 1:-1, 1:-1]
        assert_close(got, wanted, "border with antialiasing")
        got, wanted = got[inside], wanted[inside]
    assert_close(got, wanted, stage)


def davis_clips(root: Path, count: int = 3) -> list[list[str]]:
    folders = sorted((root / "JPEGImages" / "480p").iterdir())
    return [[str(folder / f"{i:05d}.jpg") for i in (0, 4, 8)] for folder in folders[:count]]


def twice(*views: ViewParameters) -> list[tuple[ViewParameters, ViewParameters]]:
    return [(view, view) for view in views]


def test_nothing_but_normalising() -> None:
    frames = noise(24, 40)
    assert_same_views(DataConfig(), [frames], twice(ViewParameters()), (24, 40), "normalise")


def test_real_frames_are_decoded_to_the_same_pixels(davis2016: Path) -> None:
    clips = davis_clips(davis2016)
    views = twice(*[ViewParameters()] * 3)
    assert_same_views(DataConfig(), clips, views, (480, 854), "decode")


def saved(folder: Path, kind: str) -> Path:
    """An image file of some kind."""
    picture = Image.fromarray(smooth(45, 61))
    deep = smooth(45, 61).astype(np.uint16) * 256 + 77
    path = folder / f"{kind} ünï.{'png' if 'png' in kind else 'jpg'}"
    exif = Image.Exif()
    exif[274] = int(kind[-1]) if kind[-1].isdigit() else 1
    if kind == "deep png":
        cv2.imwrite(str(path), deep)
    elif kind == "deep grey png":
        cv2.imwrite(str(path), deep[..., 0])
    elif kind == "alpha png":
        picture.putalpha(Image.fromarray(smooth(45, 61, 1)[..., 0]))
        picture.save(path)
    elif "grey" in kind:
        picture.convert("L").save(path)
    elif kind == "palette png":
        picture.quantize(64).save(path, transparency=3)
    elif kind == "bits png":
        picture.convert("1").save(path)
    elif kind == "cmyk jpg":
        picture.convert("CMYK").save(path)
    elif "jpg" in kind:
        sampling = {"444 jpg": 0, "422 jpg": 1}.get(kind, 2)
        picture.save(path, quality=90, subsampling=sampling, progressive="slow" in kind, exif=exif)
    else:
        picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("jpg", "444 jpg", "422 jpg", "grey jpg", "slow jpg", "cmyk jpg"),
        *(f"turned jpg {turn}" for turn in range(1, 9)),
        *("png", "grey png", "palette png", "bits png", "alpha png", "deep png", "deep grey png"),
        "turned png 6",
    ],
)
def test_every_kind_of_image_is_decoded_to_the_same_pixels(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    path = saved(folder, kind)
    size = read_image(path).shape[:2]
    assert size == ((61, 45) if kind[-1] in "5678" else (45, 61))
    stage = "decode cmyk or 16 bits" if kind[:4] in ("cmyk", "deep") else "decode"
    assert_same_views(DataConfig(), [[path]], twice(ViewParameters()), size, stage)


def test_real_frames_are_resized_alike(davis2016: Path) -> None:
    clips = davis_clips(davis2016)
    views = twice(*[ViewParameters()] * 3)
    assert_same_views(DataConfig(), clips, views, (96, 160), "resize")
    config = DataConfig(antialias=True)
    assert_same_views(config, clips, views, (96, 160), "resize with antialiasing")


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("antialias", [False, True])
def test_windows_are_those_of_views(resize: Any, antialias: bool) -> None:
    """In noise, a window that is off by one pixel differs by dozens of levels on average."""
    config = DataConfig(
        resize=resize, antialias=antialias, augment=AugmentConfig(crop=(0.05, 1), flip=0.5)
    )
    rng = np.random.default_rng(3)
    sizes = [(1, 1), (2, 9), (33, 33), (41, 57), (57, 41), (64, 48), (30, 101), (101, 30)]
    sizes += [tuple(int(n) for n in rng.integers(3, 120, 2)) for _ in range(40)]
    clips = [noise(*shape, frames=1, seed=number) for number, shape in enumerate(sizes)]
    views = [draw_views(config, 0, number) for number in range(len(clips))]
    for size in ((32, 48), (13, 7)):
        stage = "resize with antialiasing" if antialias else "resize"
        assert_same_views(config, clips, views, size, stage)


def test_halves_are_rounded_as_views_does() -> None:
    """Margins of 2.5 pixels, and corners at half a pixel."""
    config = DataConfig(resize="crop", augment=AugmentConfig(crop=(0.1, 1)))
    clips = [noise(n, 20, frames=1, seed=n) for n in range(21, 40)]
    for crop in ((0.0, 0.0, 1.0, 1.0), (0.125, 0.375, 0.5, 0.5), (0.025, 0.075, 0.25, 0.75)):
        views = twice(*[ViewParameters(crop=crop)] * len(clips))
        assert_same_views(config, clips, views, (20, 20), "resize")


@pytest.mark.parametrize("antialias", [False, True])
def test_what_is_enlarged_sees_nothing_beyond_its_window(antialias: bool) -> None:
    frames = np.full((1, 40, 40, 3), 255, np.uint8)
    frames[:, 10:20, 10:20] = 0
    config = DataConfig(antialias=antialias, augment=AugmentConfig(crop=(0.05, 0.1)))
    views = twice(ViewParameters(crop=(0.25, 0.25, 0.25, 0.25)))
    for size in ((30, 30), (30, 5), (5, 30)):
        assert_same_views(config, [frames], views, size, "normalise")


@pytest.mark.parametrize("antialias", [False, True])
def test_a_dot_lands_where_it_should(antialias: bool) -> None:
    """To a twentieth of a pixel, for shrunk, enlarged and flipped windows."""
    rng = np.random.default_rng(0)
    config = DataConfig(antialias=antialias, augment=AugmentConfig(crop=(0.2, 1), flip=0.5))
    for number in range(12):
        height, width = (int(n) for n in rng.integers(40, 200, 2))
        view = draw_views(config, 1, number)[0]
        x, y, w, h = view.crop
        column, row = width * (x + w / 2), height * (y + h / 2)
        grid = np.mgrid[:height, :width] + 0.5
        spread = min(height, width) / 8
        dot = np.exp(-((grid[0] - row) ** 2 + (grid[1] - column) ** 2) / (2 * spread**2))
        frame = np.repeat((dot * 255).astype(np.uint8)[None, ..., None], 3, -1)
        out = run(config, [frame], [(view, view)], (60, 80))[0, 0, 0, 0]
        light = np.maximum(out - out.min() - 0.5, 0)
        centre = (np.mgrid[:60, :80] + 0.5) * light
        found = centre.sum((1, 2)) / light.sum()
        like = expected(config, [frame], [(view, view)], (60, 80))[0, 0, 0, 0]
        light = np.maximum(like - like.min() - 0.5, 0)
        true = ((np.mgrid[:60, :80] + 0.5) * light).sum((1, 2)) / light.sum()
        np.testing.assert_allclose(found, true, atol=0.05)
        np.testing.assert_allclose(found, (30, 40), atol=3)


def test_flips_alone() -> None:
    config = DataConfig(augment=AugmentConfig(flip=0.5))
    clips = [noise(20, 30), noise(20, 30, seed=1)]
    views = twice(ViewParameters(flip=True), ViewParameters())
    assert_same_views(config, clips, views, (20, 30), "flip")


@pytest.mark.parametrize(
    "change",
    [
        {"jitter": (1.4, 1, 1, 0)},
        {"jitter": (0.6, 1, 1, 0)},
        {"jitter": (1, 1.4, 1, 0)},
        {"jitter": (1, 0.6, 1, 0)},
        {"jitter": (1, 1, 1.4, 0)},
        {"jitter": (1, 1, 0, 0)},
        {"jitter": (1, 1, 1, 0.3)},
        {"jitter": (1, 1, 1, -0.1)},
        {"grey": True},
        {"grey": True, "jitter": (1.3, 1.4, 1.4, 0.2)},
    ],
)
def test_each_change_of_colour_alone(change: dict[str, Any]) -> None:
    config = DataConfig(augment=AugmentConfig(jitter_chance=1))
    frames = noise(20, 30)
    views = [(ViewParameters(colour=colour_matrix(**change)), ViewParameters())]
    assert_same_views(config, [frames], views, (20, 30), "colour")


@pytest.mark.parametrize("kernel", [3, 25])
def test_blurs_alone(kernel: int) -> None:
    """Of both views, of none and of one; a sigma far wider than the kernel."""
    config = DataConfig(augment=AugmentConfig(blur=1, blur_kernel=kernel))
    sigmas = [(0.1, 0.5), (0.0, 2.0), (1.3, 0.0), (0.0, 0.0), (9.0, 3.0)]
    clips = [noise(31, 40, seed=number) for number in range(len(sigmas))]
    views = [(ViewParameters(blur_sigma=a), ViewParameters(blur_sigma=b)) for a, b in sigmas]
    assert_same_views(config, clips, views, (31, 40), "blur")


def test_colour_is_clamped_before_the_blur() -> None:
    config = DataConfig(augment=AugmentConfig(jitter_chance=1, blur=1))
    loud = colour_matrix(jitter=(1.4, 1.4, 1.4, 0.2))
    views = [(ViewParameters(colour=loud, blur_sigma=1.5), ViewParameters(colour=loud))]
    frames = noise(32, 32)
    assert ((frames / 255) @ loud[:, :3].T + loud[:, 3] > 1).mean() > 0.1
    assert_same_views(config, [frames], views, (32, 32), "blur")


@pytest.mark.parametrize("spatial", ["shared", "independent"])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_the_chain_on_real_frames(davis2016: Path, spatial: Any, resize: Any) -> None:
    clips = davis_clips(davis2016, 6)
    for antialias in (False, True):
        config = DataConfig(spatial=spatial, resize=resize, antialias=antialias, augment=EVERYTHING)
        views = [draw_views(config, 5, number) for number in range(6)]
        stage = "chain with antialiasing" if antialias else "chain"
        assert_same_views(config, clips, views, (112, 96), stage)
        # Read beforehand, whole clips are samples.
        decoded = [np.stack([read_image(path) for path in clip]) for clip in clips]
        assert_same_views(config, decoded, views, (112, 96), stage)


def test_frames_of_several_sizes_make_one_clip(tmp_path: Path) -> None:
    paths = []
    for number, shape in enumerate([(40, 60), (61, 33), (128, 127)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(smooth(*shape, seed=number)).save(paths[-1])
    for resize in ("squash", "crop"):
        config = DataConfig(resize=resize, augment=EVERYTHING)  # type: ignore[arg-type]
        views = [draw_views(config, 0, 3)]
        assert_same_views(config, [paths], views, (32, 48), "chain")


def test_a_window_decoded_alone_is_the_same(davis2016: Path, tmp_path: Path) -> None:
    augment = AugmentConfig(crop=(0.2, 0.9), flip=0.5)
    config = DataConfig(roi_decode=True, augment=augment)
    clips: list[Any] = davis_clips(davis2016)
    turned = saved(tmp_path, "turned jpg 6")
    clips.append([turned, saved(tmp_path, "png"), saved(tmp_path, "444 jpg")])
    views = [draw_views(config, 0, number) for number in range(4)]
    assert_same_views(config, clips, views, (112, 112), "resize")
    middle = twice(*[ViewParameters(crop=(0.25, 0.25, 0.5, 0.5))] * 3)
    assert_same_views(config, clips[:3], middle, (240, 427), "decode")


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mjpeg"])
def test_frames_of_a_video_file_are_the_ones_asked_for(tmp_path: Path, codec: str) -> None:
    """On a CPU DALI decodes few codecs. VP9 hides frames among those that are shown."""
    av = pytest.importorskip("av")
    path = tmp_path / "a video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for position in range(40):
            pixels = np.full((48, 64, 3), 6 * position, np.uint8)
            pixels[:, position : position + 8] = 255 - 6 * position
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    positions = np.array([3, 11, 19, 38], np.int32)
    times = read_timestamps(path)
    assert len(times) == 40
    frames = np.stack(read_frames(path, [times[position] for position in positions]))
    config, views = (
        DataConfig(augment=EVERYTHING),
        [draw_views(DataConfig(augment=EVERYTHING), 0, 1)],
    )
    graph = DaliViews(config, "videos", size=(32, 40), samples=1, device=CPU, depth=1)
    fed = {"paths": [path_bytes(str(path))], "positions": [positions]}
    graph.start([fed | view_inputs(config, views)])
    out = torch.empty(1, 2, 4, 3, 32, 40)
    graph.take(out)
    assert_close(out.numpy(), expected(config, [frames], views, (32, 40)), "chain")


def test_files_that_fail_are_found_by_trying_each(tmp_path: Path) -> None:
    good = saved(tmp_path, "png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 nothing \xff\xd9")
    paths = [good, tmp_path / "bad.jpg", good, tmp_path / "none.jpg", tmp_path / "bad.jpg", good]
    samples = [{"paths": [path_bytes(str(path))]} for path in paths]
    assert undecodable(DataConfig(), "images", samples, CPU) == [1, 3, 4]


def test_what_stands_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert obstacle("cuda") == "DALI finds no CUDA device"
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    assert obstacle("cpu") == "DALI is not installed (pip install nvidia-dali-cuda130)"
