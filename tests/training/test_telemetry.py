"""metrics.jsonl, TensorBoard and the progress bar, over interruptions; pictures of masks."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import Line, TinyConfig, assert_same, with_output

import smtc
from smtc.inference import PRESETS, predict, segment_prediction
from smtc.model import SMTC
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD
from smtc.training.distributed import World
from smtc.training.pictures import mask_picture
from smtc.training.telemetry import Telemetry, read_metrics
from smtc.training.trainer import train
from smtc.visualize import colour_labels, object_palette, plain_palette


def record(folder: Path, start: int, stop: int, *, loss: float = 0.0) -> None:
    """Steps `start` to `stop` of a run whose loss at a step is `loss` plus its number."""
    telemetry = Telemetry(folder, steps=stop, start=start, title="test")
    for step in range(start + 1, stop + 1):
        telemetry.add({"loss": torch.tensor(loss + step)}, clips=4, waited=0.0)
        telemetry.log(step, {"lr": 0.5})
    telemetry.close()


def column(folder: Path, name: str) -> list[Any]:
    return [line[name] for line in read_metrics(folder / "metrics.jsonl")]


def board(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_a_line_holds_the_means_since_the_last_one(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, steps=4, start=0, title="test")
    for step, loss in enumerate([1.0, 3.0, 10.0, 20.0], start=1):
        scalars = {"loss": torch.tensor(loss, requires_grad=True), "instance": torch.tensor(loss)}
        telemetry.add(scalars, clips=8, waited=0.0)
        if step % 2 == 0:
            told = telemetry.log(step, {"lr": 0.5})
            assert told["loss"] == told["instance"]
    telemetry.close()
    assert column(tmp_path, "step") == [2, 4]
    assert column(tmp_path, "loss") == [2.0, 15.0]
    assert column(tmp_path, "lr") == [0.5, 0.5]
    assert all(value > 0 for value in column(tmp_path, "clips_per_s"))
    assert all(value == 0 for value in column(tmp_path, "data_wait_share"))


def test_the_share_of_time_spent_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 14.0, 14.0])
    monkeypatch.setattr("smtc.training.telemetry.time.perf_counter", lambda: next(clock))
    telemetry = Telemetry(tmp_path, steps=1, start=0, title="test")
    telemetry.add({"loss": torch.tensor(1.0)}, clips=8, waited=1.0)
    values = telemetry.log(1, {})
    telemetry.close()
    assert (values["data_wait_share"], values["clips_per_s"]) == (0.25, 2.0)


def test_a_line_is_in_the_file_before_the_run_ends(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, steps=2, start=0, title="test")
    telemetry.add({"loss": torch.tensor(1.0)}, clips=1, waited=0.0)
    telemetry.log(1, {})
    assert column(tmp_path, "step") == [1]
    telemetry.close()


def test_steps_done_again_after_a_resume_are_not_doubled(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    record(tmp_path, 3, 6, loss=100.0)
    assert column(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert column(tmp_path, "loss") == [1, 2, 3, 104, 105, 106]


def test_tensorboard_shows_the_same_steps_after_a_resume(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    record(tmp_path, 3, 6, loss=100.0)
    assert board(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106)]


def test_tensorboard_files_exist_from_the_start(tmp_path: Path) -> None:
    record(tmp_path, 0, 1)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-15], encoding="utf-8")
    assert column(tmp_path, "step") == [1, 2]
    record(tmp_path, 2, 4)
    assert column(tmp_path, "step") == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_reopening_leaves_no_partial_file(tmp_path: Path) -> None:
    record(tmp_path, 0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_the_bar_goes_on_where_the_run_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 3, 4)
    assert "4/4" in capsys.readouterr().err


# In a run.


def test_a_line_has_all_that_a_person_wants_to_know(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    run = train(with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=0))
    parts = {"loss", "alignment", "regularisation", "instance", "valid_share", "skipped", "lr"}
    health = {"slots_used", "mask_entropy", "agreement", "gradient_norm"}
    norms = {"gradient_norm/encoder", "gradient_norm/head"}
    machine = {"clips_per_s", "data_wait_share", "memory_mb", "replaced_clips"}
    for line in run.metrics:
        assert line.keys() == {"step"} | parts | health | norms | machine
        assert 0 <= line["data_wait_share"] < 1 and 0 < line["slots_used"] <= 1
        assert 50 < line["memory_mb"] < 1e6  # torch alone takes some hundreds
        assert line["gradient_norm"] ** 2 == pytest.approx(
            line["gradient_norm/encoder"] ** 2 + line["gradient_norm/head"] ** 2, rel=1e-4
        )


def test_training_from_python_shows_one_bar(
    tiny_config: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smtc.train(with_output(tiny_config, tmp_path / "run", train__steps=3), method=Line())
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.replace("\r", "\n").strip().splitlines()[-1]
    # Steps, time passed, time left, and what was asked to be shown.
    assert re.search(r"smtc: 100%\|.*\| 3/3 \[\d\d:\d\d<\d\d:\d\d, .*step", last)
    assert "loss=" in last and "clips_per_s=" in last
    assert said.err.count("3/3") == 1 and said.err.count("\n") == 1


def test_the_bar_tells_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    telemetry = Telemetry(tmp_path, steps=1000, start=900, title="test")
    for _ in range(50):
        telemetry.add({"loss": torch.tensor(1.0)}, clips=1, waited=0.0)
    # A minute for the 50 steps of this run, so that another minute is left.
    telemetry._bar.start_t -= 60
    capsys.readouterr()
    telemetry._bar.refresh()
    assert re.search(r"950/1000 \[01:0\d<01:0\d", capsys.readouterr().err)
    telemetry.close()


def test_other_processes_write_and_show_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = World(torch.device("cpu"), rank=1, size=2)
    telemetry = Telemetry(tmp_path, steps=2, start=0, title="test", world=second)
    telemetry.add({"loss": torch.tensor(3.0)}, clips=4, waited=0.0)
    assert telemetry.log(1, {})["loss"] == 3.0
    telemetry.picture(1, "masks", np.zeros((4, 4, 3), np.uint8))
    telemetry.close()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_clips_of_all_processes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr("smtc.training.telemetry.time.perf_counter", lambda: next(clock))
    telemetry = Telemetry(
        tmp_path, steps=1, start=0, title="test", world=World(torch.device("cpu"), size=3)
    )
    telemetry.add({"loss": torch.tensor(1.0)}, clips=8, waited=0.0)
    assert telemetry.log(1, {})["clips_per_s"] == 3 * 8 / 2
    telemetry.close()


def test_what_pauses_is_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 61.0, 62.0, 62.0])
    monkeypatch.setattr("smtc.training.telemetry.time.perf_counter", lambda: next(clock))
    telemetry = Telemetry(tmp_path, steps=1, start=0, title="test")
    telemetry.add({"loss": torch.tensor(1.0)}, clips=8, waited=1.0)
    with telemetry.paused():
        pass
    values = telemetry.log(1, {})
    telemetry.close()
    assert (values["clips_per_s"], values["data_wait_share"]) == (4.0, 0.5)


# Pictures.


def pictures(folder: Path) -> list[tuple[int, NDArray[np.uint8]]]:
    """Step and pixels of what TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    if not events.Tags()["images"]:
        return []
    assert events.Tags()["images"] == ["masks"]
    return [
        (event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string))))
        for event in events.Images("masks")
    ]


def test_pictures_come_in_their_rhythm(tiny_config: TinyConfig, tmp_path: Path) -> None:
    rhythm = {"train__steps": 5, "train__log_every": 3, "train__pictures_every": 2}
    run = train(with_output(tiny_config, tmp_path / "run", **rhythm))
    found = pictures(run.folder)
    assert [step for step, _ in found] == [2, 4]
    frames = [picture[: picture.shape[0] // 3] for _, picture in found]
    assert not np.array_equal(*frames)  # each shows a clip of its own step
    none = train(with_output(tiny_config, tmp_path / "none", train__pictures_every=0))
    assert pictures(none.folder) == []


def test_a_method_without_masks_has_no_pictures(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run", train__pictures_every=1)
    assert pictures(train(config, method=Line()).folder) == []


def test_drawing_changes_nothing_of_the_training(tiny_config: TinyConfig, tmp_path: Path) -> None:
    lively = {"optim__encoder_from_step": 1, "model__backbone__drop_path": 0.5}
    runs = [
        train(with_output(tiny_config, tmp_path / str(n), train__pictures_every=n, **lively))
        for n in (0, 1)
    ]
    assert len(pictures(runs[1].folder)) == 4
    assert_same(*runs)
    modes = [[module.training for module in run.method.modules()] for run in runs]
    assert modes[0] == modes[1]


def test_a_picture_shows_the_clip_and_its_masks(tiny_config: TinyConfig) -> None:
    """Three rows of as many columns as the clip has frames."""
    torch.manual_seed(0)
    model = SMTC(tiny_config().model).train()
    colours = 0.2 + 0.4 * torch.eye(3)
    clip = colours[:, :, None, None].expand(3, 3, 32, 32)
    normalised = (clip - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(3, 1, 1)
    before = torch.get_rng_state()
    picture = mask_picture(model, normalised)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(p.grad is None for p in model.parameters())
    places = []
    for channel in range(3):
        wanted = np.where(np.arange(3) == channel, 153, 51)
        rows, columns = np.nonzero((np.abs(picture - wanted) <= 2).all(-1))
        assert len(rows) == 192 * 192
        places.append((rows.min(), columns.min()))
    assert places[0][0] == places[1][0] == places[2][0]
    assert places[0][1] < places[1][1] < places[2][1]
    prediction = predict(model, (255 * clip).round().byte().movedim(1, -1).numpy())
    found = list(segment_prediction(prediction, (32, 32), PRESETS["default"]))
    for shown, labels, palette in (
        (1, [frame.semantic for frame in found], plain_palette(prediction.background)),
        (2, [frame.mask for frame in found], object_palette()),
    ):
        top = places[0][0] + shown * (192 + 29 + 12)
        for (_, left), label in zip(places, labels, strict=True):
            tile = picture[top + 3 : top + 192 : 6, left + 3 : left + 192 : 6]
            assert np.array_equal(tile, colour_labels(label, palette))


def test_a_model_of_many_slots_has_pictures_too(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(
        tiny_config, tmp_path / "run", model__slots=64, train__steps=1, train__pictures_every=1
    )
    assert len(pictures(train(config).folder)) == 1
