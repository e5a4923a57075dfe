"""Which loader runs: what is packed, what can run, what was asked for; and it is said once."""

import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from smtc.config import AugmentConfig, DataConfig
from smtc.errors import UserError
from smtc.pipelines import loading
from smtc.pipelines.clips import Schedule
from smtc.pipelines.dali_loader import DaliLoader
from smtc.pipelines.inspection import inspect_folder
from smtc.pipelines.loading import Loader, build_loader
from smtc.pipelines.packing import pack
from smtc.pipelines.places import cache_folder
from smtc.pipelines.torch_loader import TorchLoader, worker_deaths_told

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build(root: Path, size: int = 32, **settings: object) -> Loader:
    config = DataConfig(root=str(root), **{"workers": 0, **settings})  # type: ignore[arg-type]
    return build_loader(config, Schedule(batch=2, steps=2), size=(size, size), seed=0)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_auto_is_torch_where_nothing_is_packed_and_no_gpu_trains(
    videos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smtc")
    assert isinstance(build(videos), TorchLoader)
    assert said(caplog) == ["Clips from image files decoded each time, augmented by OpenCV."]


def test_auto_takes_what_is_packed(videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(videos, size=48)
    caplog.set_level(logging.INFO, "smtc")
    for loader in ("auto", "cache"):
        caplog.clear()
        packed, files = build(videos, loader=loader), build(videos, loader="torch")
        assert said(caplog)[0] == "Clips from packed frames, augmented by OpenCV."
        for one, other in zip(packed, files, strict=True):
            assert torch.equal(one.views, other.views)


def test_packed_frames_may_lie_elsewhere(videos: Path, tmp_path: Path) -> None:
    pack(videos, tmp_path / "fast disk", size=48)
    with pytest.raises(UserError, match="No finished packed frames"):
        build(videos, loader="cache")
    assert len(build(videos, loader="cache", cache=str(tmp_path / "fast disk"))) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"size": 64}, "smaller than the views"),
        ({"resize": "crop"}, "--keep-aspect"),
        ({"antialias": True}, "antialias"),
    ],
)
def test_packed_frames_that_do_not_serve(
    videos: Path, settings: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    pack(videos, size=48)
    with pytest.raises(UserError, match=reason):
        build(videos, loader="cache", **settings)
    caplog.set_level(logging.INFO, "smtc")
    assert isinstance(build(videos, **settings), TorchLoader)
    assert said(caplog)[0].startswith("The packed frames are not used: ") and reason in caplog.text
    assert said(caplog)[1] == "Clips from image files decoded each time, augmented by OpenCV."


def test_a_changed_data_folder_does_not_match_what_was_packed(videos: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(videos, tmp_path / "copied"))
    pack(copied, size=48)
    next(copied.rglob("00000.jpg")).unlink()
    with pytest.raises(UserError, match="new or have changed"):
        build(copied, loader="cache")


def test_dali_runs_on_the_cpu_when_asked_for(videos: Path) -> None:
    pytest.importorskip("nvidia.dali")
    loader = build(videos, loader="dali")
    assert isinstance(loader, DaliLoader)
    assert next(iter(loader)).views.shape == (2, 2, 4, 3, 32, 32)
    loader.close()


def choice(monkeypatch: pytest.MonkeyPatch, loader: str, device: torch.device, missing: str | None):
    monkeypatch.setattr(loading, "obstacle", lambda _: missing)
    return loading._by_dali(DataConfig(loader=loader), device)  # type: ignore[arg-type]


def test_who_augments(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for loader in ("auto", "cache"):
        assert choice(monkeypatch, loader, GPU, None)
        assert not choice(monkeypatch, loader, CPU, None)
        assert caplog.text == ""
        assert not choice(monkeypatch, loader, GPU, "DALI is not installed")
        assert "DALI is not installed, so the CPU decodes" in caplog.text
        caplog.clear()
    for device in (CPU, GPU):
        assert choice(monkeypatch, "dali", device, None)
        assert not choice(monkeypatch, "torch", device, None)
        with pytest.raises(UserError, match=r"DALI is not installed; use --data\.loader torch"):
            choice(monkeypatch, "dali", device, "DALI is not installed")


def test_files_known_to_be_broken_are_not_read(
    videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(videos, tmp_path / "copied"))
    broken = sorted(copied.rglob("00003.jpg"))[2]
    broken.write_bytes(broken.read_bytes()[:-9])
    augment = AugmentConfig(crop=(0.5, 1))
    before = list(build(copied, gap=1, augment=augment, max_bad_share=1.0))
    assert inspect_folder(copied, workers=1) == 1
    caplog.set_level(logging.INFO, "smtc")
    loader = build(copied, gap=1, augment=augment, max_bad_share=1.0)
    assert said(caplog)[0] == "Known to be broken and not read: 1 (smtc data inspect)."
    for one, other in zip(before, loader, strict=True):
        assert torch.equal(one.views, other.views)


def test_places_are_outside_the_data(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(videos) == cache_folder(f"{videos}/../{videos.name}/")
    assert cache_folder(videos) != cache_folder(videos / "JPEGImages")
    assert cache_folder(videos, "there") == Path("there")
    for given in (videos, videos / "deep" / "inside"):
        with pytest.raises(UserError, match=r"lies inside the data folder .*outside"):
            cache_folder(videos, given)
    monkeypatch.setenv("XDG_CACHE_HOME", str(videos / "cache"))
    with pytest.raises(UserError, match=r"lies inside .*--data\.cache"):
        cache_folder(videos)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/someone")
    assert cache_folder(videos).parent == Path("/someone/.cache/smtc")


def test_no_data() -> None:
    with pytest.raises(UserError, match="Give --data FOLDER"):
        build_loader(DataConfig(), Schedule(batch=1, steps=1), size=(32, 32), seed=0)


def test_a_cache_folder_that_holds_nothing_is_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data\.cache .*nowhere holds neither"):
        build(videos, cache=str(tmp_path / "nowhere"))
    inspect_folder(videos, tmp_path / "seen", workers=1)
    assert isinstance(build(videos, cache=str(tmp_path / "seen")), TorchLoader)


def test_a_worker_that_is_killed_is_no_full_disk(videos: Path) -> None:
    config = DataConfig(root=str(videos), workers=1, prefetch=1)
    loader = iter(build_loader(config, Schedule(batch=2, steps=500), size=(32, 32), seed=0))
    worker = multiprocessing.active_children()[0]
    killed = pytest.raises(UserError, match=r"that loads data was killed.*--data\.workers")
    with killed, worker_deaths_told():
        os.kill(worker.pid or 0, signal.SIGKILL)
        while True:
            next(loader)
