"""The picture shows what the trainer gets, and never takes the place of another file."""

import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smtc import presets
from smtc.config import AugmentConfig, Config
from smtc.errors import UserError
from smtc.pipelines import preview as module
from smtc.pipelines.batch import Batch, Source
from smtc.pipelines.images import read_image
from smtc.pipelines.preview import contact_sheet, preview
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD

Command = Callable[..., Any]

LEFT, TITLE, GAP = module._LABELS, module._LINE, module._GAP


def flags(data: Path, *more: object) -> list[object]:
    """Small pictures of small clips; later flags win."""
    small = "--preset tiny --model.resolution 48 48 --data.workers 0 --train.device cpu"
    return ["data", "preview", data, *small.split(), *more]


def batch(views: torch.Tensor, spatial: torch.Tensor | None = None, video: str = "cat") -> Batch:
    clips = len(views)
    return Batch(views, [Source(video, (), 3, 2)] * clips, torch.arange(clips), spatial)


def normalised(rgb: torch.Tensor) -> torch.Tensor:
    """Colours `[...,3]` in 0…255 as a view has them, `[...,3,1,1]`."""
    return ((rgb / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))[..., None, None]


def plain_views(clips: int = 2, frames: int = 3, size: int = 48) -> tuple[torch.Tensor, Any]:
    """Views `[B,2,T,3,size,size]` of one colour a frame, and the colours `[B,2,T,3]`."""
    colours = torch.randint(0, 256, (clips, 2, frames, 3), generator=torch.manual_seed(0))
    return normalised(colours.float()).expand(-1, -1, -1, -1, size, size), colours.numpy()


def tile(sheet: Any, clip: int, view: int, frame: int, *, clips: int, side: int, lines: int = 1):
    """The part of a sheet that shows a frame `side` pixels wide and high."""
    block = (sheet.shape[0] - 2 * GAP) // clips
    top = 2 * GAP + clip * block + lines * TITLE + view * (side + GAP)
    left = LEFT + frame * (side + GAP)
    return sheet[top : top + side, left : left + side]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# What is drawn.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_frame_has_its_place_and_its_colours_back(dtype: torch.dtype) -> None:
    views, colours = plain_views()
    sheet = contact_sheet(batch(views.to(dtype)))
    assert sheet.dtype == np.uint8 and sheet.flags.writeable
    for clip, view, frame in np.ndindex(colours.shape[:3]):
        shown = tile(sheet, clip, view, frame, clips=2, side=192)
        assert (shown == shown[0, 0]).all()
        off = np.abs(shown[0, 0].astype(int) - colours[clip, view, frame])
        assert off.max() <= (0 if dtype == torch.float32 else 2)


def test_values_beyond_the_range_of_colours_are_clipped() -> None:
    views = normalised(torch.tensor([-300.0, 100.0, 700.0])).expand(1, 2, 2, 3, 48, 48)
    shown = tile(contact_sheet(batch(views)), 0, 1, 1, clips=1, side=192)
    assert shown[5, 5].tolist() == [0, 100, 255]


def test_the_picture_is_what_the_files_hold(videos: Path, here: Path) -> None:
    """Without augmentation, pixel by pixel."""
    config = tiny(videos)
    loader = module.build_loader(
        config.data, module.Schedule(batch=3, steps=1), size=(48, 48), seed=config.train.seed
    )
    expected = next(iter(loader))
    sheet = np.asarray(Image.open(preview(config, clips=3)))
    for clip, source in enumerate(expected.sources):
        for frame, path in enumerate(source.frames):
            for view in (0, 1):
                shown = tile(sheet, clip, view, frame, clips=3, side=192)[::4, ::4]
                np.testing.assert_array_equal(shown, read_image(path))


def tiny(videos: Path, **data: Any) -> Config:
    """The tiny preset on the 48x48 videos without augmentation."""
    config = presets.get("tiny")
    changes = {"root": str(videos), "workers": 0, "augment": AugmentConfig(), **data}
    return replace(
        config,
        model=replace(config.model, resolution=(48, 48)),
        data=replace(config.data, **changes),
        train=replace(config.train, batch=2),
    )


def test_a_later_step_shows_the_trainers_clips(
    videos: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 of a run with 2 clips a step begins with sample 6, however many are drawn."""
    seen: list[Batch] = []

    def keep(made: Batch) -> Any:
        seen.append(made)
        return contact_sheet(made)

    monkeypatch.setattr(module, "contact_sheet", keep)
    for clips in (1, 5):
        preview(tiny(videos), clips=clips, step=3)
    assert [made.index.tolist() for made in seen] == [[6], [6, 7, 8, 9, 10]]


def test_the_map_puts_each_view_back_into_its_place() -> None:
    """The student sees the lower right quarter mirrored, the teacher the left part."""
    views = torch.zeros(1, 2, 2, 3, 48, 48)
    views[:, 0, :, :, :, :24] = normalised(torch.tensor([250.0, 0, 0]))
    views[:, 0, :, :, :, 24:] = normalised(torch.tensor([0, 250.0, 0]))
    views[:, 1] = normalised(torch.tensor([0, 0, 250.0]))
    where = torch.tensor([[[0.5, 0.5, 0.5, 0.5, 1.0], [0.0, 0.0, 0.75, 1.0, 0.0]]])
    sheet = contact_sheet(batch(views, where))
    side, left = 2 * 192 + GAP, LEFT + 2 * (192 + GAP)
    top = 2 * GAP + 2 * TITLE
    shown = sheet[top : top + side, left : left + side]
    assert shown.shape == (side, side, 3)
    assert shown[side // 2, side // 4].tolist() == [0, 0, 250]
    assert shown[3 * side // 4, 5 * side // 8].tolist() == [0, 250, 0]
    assert shown[3 * side // 4, 7 * side // 8].tolist() == [250, 0, 0]
    assert shown[side // 4, 7 * side // 8].tolist() == list(module._EMPTY)
    assert tuple(shown[side // 2, 0]) == module._COLOURS[1]
    assert tuple(shown[side - 1, side - 1]) == module._COLOURS[0]


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(
    ("clips", "frames", "size"),
    [(1, 2, (16, 16)), (4, 4, (480, 854)), (1, 120, (64, 64)), (40, 2, (96, 8)), (1, 2, (1, 300))],
)
def test_the_sheet_has_a_sensible_size(
    clips: int, frames: int, size: tuple[int, int], independent: bool
) -> None:
    spatial = torch.tensor([0.1, 0.2, 0.01, 0.01, 1]).expand(clips, 2, 5) if independent else None
    views = torch.zeros(1, 1, 1, 1, 1, 1).expand(clips, 2, frames, 3, *size)
    height, width, _ = contact_sheet(batch(views, spatial)).shape
    assert 640 <= width <= max(2700, frames * 40)
    assert height <= 3600 + clips * 60


@pytest.mark.parametrize(
    "name",
    ["", "a\nb", "ж" * 400, "x" * 5000, "\udcff bytes", "two  words", "😀", "a\x00b"],
    ids=["empty", "line", "long", "longer", "bytes", "spaces", "emoji", "zero"],
)
def test_any_name_is_a_title(name: str) -> None:
    views, _ = plain_views(clips=1)
    named, unnamed = (contact_sheet(batch(views, video=video)) for video in (name, ""))
    assert named.shape == unnamed.shape
    title = slice(0, 2 * GAP + TITLE)
    np.testing.assert_array_equal(
        named[title.stop :], unnamed[title.stop :], "the title reaches into the pictures"
    )
    assert (named[title] != unnamed[title]).any() == (name != "")
    assert (named[:, -GAP:] == module._PAPER).all()


# The command.


def test_the_command_says_where_the_picture_is_and_what_is_on(
    cli: Command, videos: Path, here: Path
) -> None:
    told = cli(*flags(videos, "--data.augment.crop", 0.5, 1, "--data.augment.flip", 0.5))
    assert told.code == 0, told
    assert "crop 0.5 to 1 of the area, flip 0.5, jitter 0.8 (0.4 0.4 0.4 0.3); " in told.out
    assert "crop and flip are shared by the two views" in told.out
    assert str(here / "preview.png") in told.out
    assert os.listdir(here) == ["preview.png"]
    with Image.open("preview.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
    off = cli(*flags(videos, "--data.augment.jitter-chance", 0))
    assert "No augmentation is on." in off.out


def test_each_view_has_a_row_and_its_own_crop_where_it_is_asked_for(
    cli: Command, videos: Path, here: Path
) -> None:
    more = ["--data.spatial", "independent", "--data.augment.crop", 0.3, 0.6, "--clips", 2]
    told = cli(*flags(videos, *more))
    assert "crop and flip are drawn for each view" in told.out


def test_iterating_replaces_the_picture(cli: Command, videos: Path, here: Path) -> None:
    pictures = []
    for seed in (0, 1, 1):
        assert cli(*flags(videos, "--train.seed", seed)).code == 0
        pictures.append((here / "preview.png").read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]


def test_the_folder_may_come_from_flags_settings_or_anywhere_among_its_own_flags(
    cli: Command, videos: Path, here: Path
) -> None:
    (here / "run.toml").write_text(f'preset = "tiny"\n[data]\nroot = "{videos}"\nworkers = 0\n')
    for arguments in (
        ["--config", "run.toml"],
        ["--config=run.toml", "--clips=2", "--output", "b.png"],
        ["--preset", "tiny", videos, "--data.workers", 0],
        ["--clips", 1, "--step", 2, videos, "--preset", "tiny"],
        ["--preset", "tiny", "--data.workers", 0, "--data", videos],
        [videos, "--preset", "tiny", "--data", "nowhere"],
    ):
        told = cli("data", "preview", *arguments)
        assert told.code == 0, (arguments, told)
    assert (here / "b.png").exists()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_begins_with_a_sentence_and_an_example(cli: Command, here: Path, flag: str) -> None:
    for arguments in ([flag], ["videos", "--clips", 3, flag]):
        told = cli("data", "preview", *arguments)
        assert told.code == 0
        lines = [line for line in told.out.splitlines() if line]
        assert lines[0].startswith("usage: smtc data preview")
        assert lines[1].startswith("Draw the clips that a training run would see")
        assert "smtc data preview videos --preset paper --data.augment.crop" in lines[2]
        assert {"--output", "--clips", "--step"} <= set(re.findall(r"--\w+", told.out))
    assert os.listdir(here) == []


def test_the_warm_starts_own_grey_is_mentioned(cli: Command, videos: Path, here: Path) -> None:
    told = cli(*flags(videos, "--preset", "tiny_encoder"))
    assert "whole batches are grey at chance 0.2" in told.out


# Files that are in the way, and other mistakes.


@pytest.mark.parametrize("named", [False, True])
def test_another_file_is_left_as_it_is(
    refused: Command, videos: Path, here: Path, named: bool
) -> None:
    other = io.BytesIO()
    Image.new("RGB", (9, 9)).save(other, format="PNG")
    name = "mine.png" if named else "preview.png"
    for content in (other.getvalue(), b"", b"text", other.getvalue()[:30]):
        (here / name).write_bytes(content)
        said = refused(*flags(videos, *(["--output", name] if named else [])))
        assert "--output" in said and name in said
        assert (here / name).read_bytes() == content
        assert os.listdir(here) == [name]


def test_what_is_no_file_is_left_as_it_is(refused: Command, videos: Path, here: Path) -> None:
    (here / "folder.png").mkdir()
    os.mkfifo(here / "pipe.png")
    for name in ("folder.png", "pipe.png"):
        assert name in refused(*flags(videos, "--output", name))
    assert sorted(os.listdir(here)) == ["folder.png", "pipe.png"]


def test_links_are_followed(cli: Command, refused: Command, videos: Path, here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / "preview.png").symlink_to("elsewhere/picture.png")
    for _ in range(2):
        assert cli(*flags(videos)).code == 0
    assert (here / "preview.png").is_symlink() and os.listdir("elsewhere") == ["picture.png"]
    # A link does not make another file ours.
    (here / "mine.png").write_bytes(b"mine")
    (here / "link.png").symlink_to("mine.png")
    refused(*flags(videos, "--output", "link.png"))
    assert (here / "mine.png").read_bytes() == b"mine"


def test_missing_folders_are_made(cli: Command, videos: Path, here: Path) -> None:
    assert cli(*flags(videos, "--output", "a b/ж/p.PNG")).code == 0
    assert (here / "a b" / "ж" / "p.PNG").exists()


@pytest.mark.parametrize("output", ["file.png/p.png", "p.jpg", "p", "x" * 300 + ".png"])
def test_places_that_cannot_be(refused: Command, videos: Path, here: Path, output: str) -> None:
    (here / "file.png").write_bytes(b"x")
    said = refused(*flags(videos, "--output", output))
    assert "--output" in said or ".png" in said
    assert os.listdir(here) == ["file.png"]


def test_no_picture_lands_among_the_frames(refused: Command, videos: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(videos, tmp_path / "data"))
    before = sorted(data.rglob("*"))
    (tmp_path / "link").symlink_to(data)
    for output in (data / "p.png", tmp_path / "link" / "new" / "p.png"):
        assert "inside the data folder" in refused(*flags(data, "--output", output))
    assert sorted(data.rglob("*")) == before


def test_a_full_disk_and_a_read_only_one(
    refused: Command, videos: Path, mounted: Callable[[str], Path]
) -> None:
    full, read_only = mounted("size=16k"), mounted("ro,size=64k")
    for folder in (full, read_only):
        assert "cannot be written" in refused(*flags(videos, "--output", folder / "p.png"))
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--clips", 0], "--clips is 0; a picture shows 1 to 128"),
        (["--clips", "10000"], "--clips is 10000"),
        (["--clips", "many"], "--clips is 'many'; it takes a whole number."),
        (["--clips"], "--clips needs a value"),
        (["--step", -1], "--step is -1"),
        (["--data.augment.flp", 1], "--data.augment.flip"),
        (["--data.augment.flip", 2], "a chance lies in [0, 1]"),
        (["--preset", "tny"], "tiny"),
        (["--data.frames", 99], "fewer than 99 frames"),
        (["stray"], "stray"),
    ],
    ids=str,
)
def test_mistakes(
    refused: Command, videos: Path, here: Path, more: list[object], told: str
) -> None:
    assert told in refused(*flags(videos, *more))
    assert os.listdir(here) == []


def test_no_folder_at_all(refused: Command, here: Path) -> None:
    assert "Give smtc data preview FOLDER" in refused("data", "preview")
    assert "does not exist" in refused(*flags(here / "nowhere"))
    with pytest.raises(UserError):
        preview(presets.get("paper"))


def test_unreadable_frames_are_replaced_and_named(
    cli: Command, refused: Command, videos: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(videos, here / "data"))
    frames = sorted(data.rglob("*.jpg"))
    for frame in frames[:8]:
        frame.write_bytes(b"")
    assert cli(*flags(data, "--clips", 8)).code == 0
    assert "00000/" in caplog.text and "the file is empty" in caplog.text
    (here / "preview.png").unlink()
    for frame in frames:
        frame.write_bytes(b"")
    assert "No readable clip" in refused(*flags(data))
    assert not (here / "preview.png").exists()
