"""`smtc bench data`: rows, ratios, failures, and that the baselines do the same work."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smtc import presets
from smtc.benchmarks import data, data_baselines, data_videos
from smtc.benchmarks.blocks import markdown
from smtc.benchmarks.data import Open, Setup
from smtc.benchmarks.data_baselines import _Look, _Where
from smtc.benchmarks.harness import read_report
from smtc.benchmarks.tables import data_blocks
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import read_image
from smtc.pipelines.views import ViewParameters, apply_view

QUICK = ("--device", "cpu", "--threads", 1, "--clips", 2, "--seconds", 0.04)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames, views and rounds that take no time."""
    monkeypatch.setattr(data_videos, "VIDEOS", 2)
    monkeypatch.setattr(data_videos, "FRAMES", 6)
    monkeypatch.setattr(data, "CASES", {"720p": (36, 64), "480p": (24, 42)})
    monkeypatch.setattr(data, "SIZE", (16, 16))
    monkeypatch.setattr(data, "PACKED_SIZE", 96)  # the training run wants as many
    monkeypatch.setattr(data, "ROUNDS", 2)


def rows_of(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_report(folder / "data.json")["rows"]
    return rows if kind is None else [row for row in rows if row.get("kind") == kind]


def test_every_loader_has_its_rows(cli: Callable[..., Any], tmp_path: Path) -> None:
    names = ("torch", "cache", "pil", "opencv")
    told = cli("bench", "data", *QUICK, "--providers", *names, "--steps", 3, "--output", tmp_path)
    assert told.code == 0, told
    rates = rows_of(tmp_path, "rate")
    assert [(row["case"], row["provider"]) for row in rates] == [
        *((case, provider) for case in ("720p", "480p") for provider in ("torch", "pil", "opencv")),
        ("packed", "cache"),
    ]
    for row in rates:
        assert (row["device"], row["threads"], row["repeats"]) == ("cpu", 1, 2)
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "clips/s"
        assert row["frames_per_s"] == pytest.approx(4 * row["median"], abs=0.1)
        assert row["cpu_ms_per_clip"] > 0
        is_packed = row["case"] == "packed"
        assert row["bytes_per_frame"] == 3 * 96 * 96 if is_packed else row["bytes_per_frame"] > 500
    assert [(row["case"], row["provider"]) for row in rows_of(tmp_path, "ratio")] == [
        ("720p", "torch / pil"),
        ("720p", "torch / opencv"),
        ("480p", "torch / pil"),
        ("480p", "torch / opencv"),
        ("720p", "cache / torch"),
    ]
    waits = rows_of(tmp_path, "wait")
    assert [(row["case"], row["provider"]) for row in waits] == [
        ("720p", "torch"),
        ("packed", "cache"),
    ]
    assert all(0 <= row["median"] <= 1 and row["steps"] == 3 for row in waits)
    (settings,) = [row for row in rows_of(tmp_path) if row["case"] == "settings"]
    assert settings["view"] == [16, 16] and settings["page_cache"] == "warm"
    assert settings["augment"]["blur"] > 0 and settings["augment"]["flip"] > 0
    assert "| 720p | torch | cpu | 1 |" in told.out and "cache / torch" in told.out
    assert not multiprocessing.active_children()
    again = cli("bench", "report", tmp_path)
    assert again.code == 0 and markdown(data_blocks(rows_of(tmp_path))) in again.out


def opened(
    provider: str,
    rates: list[float],
    *,
    case: str = "720p",
    device: str = "cpu",
    threads: int = 2,
    cpu: float = 10.0,
) -> Open:
    return Open(Setup(case, provider, device, threads), Stocked(), rates, [cpu])


def test_ratios_are_taken_round_by_round() -> None:
    rows = data.ratios(
        [
            opened("pil", [10.0, 20.0, 40.0]),
            opened("torch", [20.0, 60.0, 40.0], cpu=4.0),
            opened("dali", [10.0, 30.0, 60.0]),
            opened("dali", [1.0, 1.0, 1.0], device="cuda"),
            opened("cache", [60.0, 180.0, 200.0], case="packed"),
            opened("torch", [9.0, 9.0, 9.0], case="480p"),
        ],
        "720p",
    )
    found = {(row["case"], row["provider"]): row for row in rows}
    assert {key: (row["median"], row.get("target")) for key, row in found.items()} == {
        ("720p", "torch / pil"): (2.0, 1.4),
        ("720p", "dali / torch"): (0.5, 0.7),
        ("720p", "cache / torch"): (3.0, 2.5),
    }
    assert (found["720p", "torch / pil"]["p20"], found["720p", "torch / pil"]["p80"]) == (1.0, 3.0)
    assert all(row["unit"] == "times" and row["threads"] == 2 for row in rows)
    assert found["720p", "torch / pil"]["cpu_ratio"] == 2.5
    assert found["720p", "dali / torch"]["cpu_ratio"] == 0.4


def test_targets_are_for_two_workers_only() -> None:
    (row,) = data.ratios(
        [opened("torch", [2.0], threads=1), opened("pil", [1.0], threads=1)], "720p"
    )
    assert "target" not in row


class Stocked:
    """Batches of 2 clips: at once as many as were made ahead, then each after a while."""

    def __init__(self, ahead: int = 0, pause: float = 0.0, fails_at: int | None = None) -> None:
        self.ahead, self.pause, self.fails_at = ahead, pause, fails_at
        self.given, self.closed = 0, False

    def __next__(self) -> Tensor:
        self.given += 1
        if self.given == self.fails_at:
            raise RuntimeError("worker killed\nby whom?")
        if self.given > self.ahead:
            time.sleep(self.pause)
        return torch.zeros(2, 1)

    def close(self) -> None:
        self.closed = True


def bench(folder: Path) -> data._Bench:
    places = data.Places({"720p": folder}, None)
    return data._Bench(data.Report(folder / "data.json"), places, "cpu", 2)


def test_what_was_made_ahead_does_not_count(tmp_path: Path) -> None:
    batches = Stocked(ahead=6, pause=0.02)
    rate, _ = bench(tmp_path)._round(Setup("720p", "pil", "cpu", 3), batches, 0.1)
    assert 50 < rate <= 100  # 2 clips every 20 ms
    assert (batches.given - 6) % 3 == 0


def test_time_of_live_children_counts() -> None:
    def work() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        time.sleep(60)

    def of_children() -> float:
        return data.cpu_seconds() - time.process_time()

    before = of_children()
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    try:
        end = time.monotonic() + 20
        while of_children() - before < 0.2 and time.monotonic() < end:
            time.sleep(0.02)
        assert 0.2 <= of_children() - before < 2
    finally:
        child.kill()
        child.join()


def test_a_loader_that_cannot_start_leaves_a_row_and_the_others(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ImportError("libjpeg is missing\nfrom here")

    monkeypatch.setattr(data, "TorchLoader", broken)
    start = ("bench", "data", *QUICK, "--cases", "480p", "--output", tmp_path)
    told = cli(*start, "--providers", "torch", "pil")
    assert told.code == 0 and "Left out: torch 480p, 1 workers: ImportError: libjpeg" in told.out
    failed, measured = [row for row in rows_of(tmp_path) if row["case"] == "480p"]
    assert (failed["provider"], failed["error"]) == ("torch", "ImportError: libjpeg is missing")
    assert measured["provider"] == "pil" and measured["median"] > 0
    assert not rows_of(tmp_path, "wait")
    told = cli(*start, "--providers", "torch")
    assert told.code == 1 and "| 480p torch cpu threads 1 | ImportError" in told.out


def test_a_loader_that_fails_on_its_way_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"pil": Stocked(fails_at=9), "opencv": Stocked()}
    one = bench(tmp_path)
    monkeypatch.setattr(one, "_open", lambda setup: made[setup.provider])
    monkeypatch.setattr(data_videos, "bytes_per_frame", lambda folder: 1)
    setups = [Setup("720p", name, "cpu", 1) for name in made]
    one.measure(setups, 0.02, None)
    assert [(row["provider"], row.get("error")) for row in rows_of(tmp_path)] == [
        ("pil", "RuntimeError: worker killed"),
        ("opencv", None),
    ]
    assert made["pil"].closed and made["opencv"].closed


def test_given_videos_are_copied_and_packed(
    cli: Callable[..., Any], tmp_path: Path, synthetic_data: Path
) -> None:
    before = sorted(synthetic_data.rglob("*"))
    told = cli(
        *("bench", "data", *QUICK, "--data", synthetic_data, "--providers", "torch", "cache"),
        *("--steps", 0, "--output", tmp_path),
    )
    assert told.code == 0, told
    rates = rows_of(tmp_path, "rate")
    assert [(row["case"], row["provider"]) for row in rates] == [
        ("given", "torch"),
        ("packed", "cache"),
    ]
    assert not rows_of(tmp_path, "wait") and len(rows_of(tmp_path, "ratio")) == 1
    assert sorted(synthetic_data.rglob("*")) == before


def test_few_of_many_given_frames_are_taken(tmp_path: Path, synthetic_data: Path) -> None:
    data_videos.FRAMES = 3  # restored with the fixture's change
    data_videos.copy_videos(synthetic_data, tmp_path / "copy")
    videos = find_videos(tmp_path / "copy")
    assert [len(video.frames) for video in videos] == [6, 6]
    originals = find_videos(synthetic_data)[:2]
    for copy, original in zip(videos, originals, strict=True):
        assert copy.name == original.name
        first = zip(copy.frames, original.frames[:6], strict=True)
        assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in first)


def test_written_frames_weigh_as_much_as_footage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_videos, "FRAMES", 2)
    data_videos.write_videos(tmp_path / "large", 720, 1280)
    assert 80_000 < data_videos.bytes_per_frame(tmp_path / "large") < 200_000
    first, second = find_videos(tmp_path / "large")
    pictures = [read_image(path) for path in (*first.frames, *second.frames)]
    assert {picture.shape for picture in pictures} == {(720, 1280, 3)}
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0].astype(int) - pictures[2]).mean() > 10


def photograph(tmp_path: Path) -> str:
    data_videos.write_videos(tmp_path / "videos", 120, 160)
    return find_videos(tmp_path / "videos")[0].frames[0]


def test_the_baselines_crop_and_flip_like_the_views(tmp_path: Path) -> None:
    path = photograph(tmp_path)
    where, look = _Where(0.25, 0.125, 0.5, True), _Look(None, False, 0.0)
    view = ViewParameters(crop=(0.25, 0.125, 0.5, 0.5), flip=True)
    expected = apply_view([read_image(path)], view, (40, 48), antialias=True)[0]
    for provider, load in data_baselines.BASELINES.items():
        first, second = load(path, where, [look, look], (40, 48))
        assert (first.shape, first.dtype) == ((3, 40, 48), torch.float32)
        torch.testing.assert_close(first, second)
        assert np.abs(first.numpy() - expected).mean() < 0.06, provider


@pytest.mark.parametrize(
    "look",
    [
        _Look((1.3, 1.0, 1.0, 0.0), False, 0.0),
        _Look((1.0, 0.6, 1.0, 0.0), False, 0.0),
        _Look((1.0, 1.0, 0.3, 0.0), False, 0.0),
        _Look((1.0, 1.0, 1.0, 0.1), False, 0.0),
        _Look(None, True, 0.0),
        _Look(None, False, 2.0),
        _Look((0.7, 1.3, 1.2, -0.1), True, 1.0),
    ],
)
def test_the_baselines_change_colours_alike(tmp_path: Path, look: _Look) -> None:
    path = photograph(tmp_path)
    where, same = _Where(0.0, 0.0, 1.0, False), _Look(None, False, 0.0)
    size = (120, 160)  # nothing to resize: the filters would differ
    plain, pil = data_baselines.BASELINES["pil"](path, where, [same, look], size)
    _, opencv = data_baselines.BASELINES["opencv"](path, where, [same, look], size)
    changed = (pil - plain).abs().mean()
    assert changed > 0.02
    assert (pil - opencv).abs().mean() < 0.25 * changed


def test_the_baselines_draw_each_view_s_look_alone() -> None:
    config = presets.fixed().data
    rng = np.random.default_rng(0)
    drawn = [data_baselines._draw(config, rng) for _ in range(400)]
    assert 0.4 < np.mean([where.flip for where, _ in drawn]) < 0.6
    assert all(0 <= where.x <= 1 - where.side and 0.7 < where.side <= 1 for where, _ in drawn)
    looks = [look for _, pair in drawn for look in pair]
    chances = [
        np.mean([look.jitter is not None for look in looks]),
        np.mean([look.grey for look in looks]),
        np.mean([look.sigma > 0 for look in looks]),
    ]
    np.testing.assert_allclose(chances, (0.8, 0.2, 0.5), atol=0.06)
    assert np.mean([first == second for _, (first, second) in drawn]) < 0.1


def test_without_time_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = data.run(tmp_path, providers=["pil"], cases=["480p"], threads=[1], deadline=0.0)
    assert code == 1 and "Out of time" in capsys.readouterr().out
    assert [row["case"] for row in rows_of(tmp_path)] == ["settings"]


def test_mistakes_end_in_a_sentence(
    safe: Callable[..., str], tmp_path: Path, synthetic_data: Path
) -> None:
    start = ("bench", "data", "--output", tmp_path / "out")
    assert "no provider 'tensorflow'; there are torch" in safe(*start, "--providers", "tensorflow")
    assert "no case '4k'; there are 720p, 480p, packed" in safe(*start, "--cases", "4k")
    given = (*start, "--data", synthetic_data)
    assert "only packed goes with it" in safe(*given, "--cases", "480p")
    for flag in ("--threads", "--clips", "--seconds"):
        assert "--threads and --clips from 1" in safe(*start, flag, 0)
    assert "--steps from 0" in safe(*start, "--steps", -1)
    nothing = safe(*start, "--providers", "cache", "--cases", "480p")
    assert "None of these --providers" in nothing
    assert "does not exist" in safe(*start, "--data", tmp_path / "none")
    if not torch.cuda.is_available():
        assert "CUDA was asked for" in safe(*start, "--device", "cuda")


def test_help_names_every_flag(cli: Callable[..., Any]) -> None:
    told = cli("bench", "data", "--help")
    flags = ("output", "data", "providers", "cases", "threads", "clips", "seconds", "steps")
    assert told.code == 0 and all(f"--{flag}" in told.out for flag in (*flags, "device"))
