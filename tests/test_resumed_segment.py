"""`smtc segment` that was stopped: the same command goes on and ends with the same bytes."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from colour_model import GREEN, GREY, RED, ColourModel
from commands import Command
from PIL import Image

from smtc import segment_video as module
from smtc.errors import UserError
from smtc.inference import CHUNK
from smtc.segment_video import segment_video

COUNT = 3 * CHUNK + 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A red box that comes and goes over a green one; a scene begins with the third chunk."""
    path = tmp_path / "in" / "boxes"
    path.mkdir(parents=True)
    for index in range(COUNT):
        ground = GREY if index < 2 * CHUNK else (100, 100, 100)
        frame = np.full((64, 96, 3), ground, np.uint8)
        frame[24:48, 60:84] = GREEN
        if index % 11 < 8:
            frame[16:40, (left := 8 + index % 40) : left + 24] = RED
        cv2.imwrite(str(path / f"{index:03d}.png"), frame[..., ::-1])
    return path


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def stop_at(monkeypatch: pytest.MonkeyPatch, frame: int, error: type[BaseException]) -> None:
    """The mask of `frame` is never written whole."""
    write, seen = module.write_ids, iter(range(10**6))

    def writing(path: Path, ids: np.ndarray) -> None:
        if next(seen) == frame:
            path.write_bytes(b"half")
            raise error()
        write(path, ids)

    monkeypatch.setattr(module, "write_ids", writing)


@pytest.mark.parametrize("maps", ["instance", "semantic"])
@pytest.mark.parametrize(
    "stops", [[CHUNK + 3], [0, CHUNK - 1, 5, CHUNK + 6], [2 * CHUNK, 3], [CHUNK]]
)
def test_it_goes_on_and_ends_with_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: list[int],
    maps: module.Maps,
) -> None:
    model, output = ColourModel(), tmp_path / "out"
    segment_video(ColourModel(), folder, tmp_path / "whole", maps=maps, viewer=True)
    for frame in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, frame, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                segment_video(model, folder, output, maps=maps, viewer=True)
        assert not output.exists()
    segment_video(model, folder, output, maps=maps, viewer=True)
    assert contents(output) == contents(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_done_is_not_done_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * CHUNK + 9, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            segment_video(ColourModel(), folder, tmp_path / "out")
    model = ColourModel()
    with caplog.at_level(logging.INFO, logger="smtc"):
        segment_video(model, folder, tmp_path / "out")
    assert sum(shape[0] * 4 for shape, _ in model.calls) == CHUNK + 8
    assert f"Going on after the {2 * CHUNK} frames that an earlier call did." in caplog.messages


def test_a_mistake_leaves_nothing_to_go_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = folder / f"{CHUNK + 2:03d}.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-20])
    with pytest.raises(UserError):
        segment_video(ColourModel(), folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def stopped(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Path:
    with monkeypatch.context() as patch:
        stop_at(patch, CHUNK + 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            segment_video(ColourModel(), folder, output, **options)  # type: ignore[arg-type]
    return output.with_name(f".{output.name}.smtc-partial")


@pytest.mark.parametrize("other", ["model", "maps", "frames", "settings"])
def test_another_command_starts_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    output, model = tmp_path / "out", ColourModel()
    stopped(folder, output, monkeypatch)
    options = {}
    if other == "model":
        with torch.no_grad():
            model.colours += 1e-4
    elif other == "maps":
        options["maps"] = "semantic"
    elif other == "settings":
        options["preset"] = module.InferenceSettings(similarity=0.4)
    else:
        frame = folder / "000.png"
        cv2.imwrite(str(frame), np.full((64, 96, 3), 9, np.uint8))
    segment_video(model, folder, output, **options)
    assert sum(shape[0] * 4 for shape, _ in model.calls) == 4 * -(-COUNT // 4)


@pytest.mark.parametrize("damage", [".state.npz", ".frames.jsonl", "masks/boxes/00003.png"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_damage_to_what_was_left_costs_time_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, how: str
) -> None:
    if damage.startswith("masks") and how == "cut":
        pytest.skip("masks are written before the state that counts them")
    left = stopped(folder, tmp_path / "out", monkeypatch)
    kept = (left / damage).read_bytes()
    if how == "gone":
        for path in left.glob("masks/boxes/*") if damage.startswith("masks") else [left / damage]:
            path.unlink()
    else:
        (left / damage).write_bytes(kept[: len(kept) // 2])
    segment_video(ColourModel(), folder, tmp_path / "out")
    segment_video(ColourModel(), folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_real_kill(cli: Command, tiny_run: Path, tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(160):
        frame = np.kron(
            rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)
        )
        cv2.imwrite(str(folder / f"{index:03d}.png"), frame)
    flags = ["segment", folder, "--device", "cpu", "--checkpoint", tiny_run, "--output"]
    command = [sys.executable, "-m", "smtc", *map(str, flags), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    state = tmp_path / ".out.smtc-partial" / ".state.npz"
    while not state.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(how)
    said = process.communicate()[1].decode()
    assert process.returncode == (-9 if how is signal.SIGKILL else 130)
    assert how is signal.SIGKILL or "The same command goes on where it stopped." in said
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Going on after the " in done.stderr, done.stderr
    assert cli(*flags, tmp_path / "whole").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with Image.open(tmp_path / "out" / "masks" / "noise" / "00159.png") as image:
        assert image.size == (64, 48)
