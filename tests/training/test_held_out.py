"""Scores on held-out videos while a run goes on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import Line, TinyConfig, moments, with_output

from smtc.config import Config, EvalConfig
from smtc.errors import UserError
from smtc.evaluation.discovery import evaluate_discovery
from smtc.inference import FrameSegmentation
from smtc.model import SMTC
from smtc.training import held_out
from smtc.training.distributed import World
from smtc.training.held_out import HeldOut
from smtc.training.trainer import Run, train

ALONE = World(torch.device("cpu"))


@pytest.fixture
def scored(tiny_config: TinyConfig, tmp_path: Path, synthetic_data: Path) -> Config:
    """Six steps, of which 2, 4 and 6 are scored; logged at 3 and 6."""
    return with_output(
        tiny_config,
        tmp_path / "scored",
        eval__data=str(synthetic_data),
        eval__every=2,
        train__steps=6,
        train__log_every=3,
        optim__encoder_from_step=2,
        model__backbone__drop_path=0.3,
    )


def scores_in_turn(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    turn = iter(values)
    monkeypatch.setattr(HeldOut, "score", lambda *_: {"fg_iou": next(turn)})


def test_scores_stand_beside_the_loss_of_their_step(scored: Config) -> None:
    run = train(scored)
    assert [line["step"] for line in run.metrics] == [2, 3, 4, 6]
    names = {"ari", "fg_iou", "miou", "fg_ari", "instance_ari", "instance_miou"}
    names |= {"identity_switch_rate", "id_coverage"}
    for line in run.metrics:
        found = {key for key in line if key.startswith("eval/") or key == "score"}
        assert found == (set() if line["step"] == 3 else {f"eval/{n}" for n in names} | {"score"})
        assert np.isfinite(line["loss"])
        assert "score" not in line or line["score"] == line["eval/fg_iou"]
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in ("score", "eval/miou"):
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        told = [(line["step"], pytest.approx(line[name])) for line in run.metrics if name in line]
        assert drawn == told


def test_the_last_score_is_that_of_the_saved_model(scored: Config, tmp_path: Path) -> None:
    run = train(scored)
    model = run.method.segmenter()
    assert model is not None and scored.eval.data is not None
    results = evaluate_discovery(model, "synthetic", scored.eval.data, tmp_path / "out")
    last = run.metrics[-1]
    for name, value in last.items():
        if name.startswith("eval/"):
            assert results[name.removeprefix("eval/")] == pytest.approx(value, abs=1e-6)


def test_scoring_changes_nothing_of_the_training(
    scored: Config, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    plain = with_output(
        tiny_config,
        tmp_path / "plain",
        train__steps=6,
        train__log_every=3,
        optim__encoder_from_step=2,
        model__backbone__drop_path=0.3,
    )
    first, second = train(plain), train(scored)
    torch.testing.assert_close(
        first.method.state_dict(), second.method.state_dict(), rtol=0, atol=0
    )
    torch.testing.assert_close(moments(first), moments(second), rtol=0, atol=0)
    modes = [[module.training for module in run.method.modules()] for run in (first, second)]
    assert modes[0] == modes[1]


def best_of(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "checkpoints" / "best.json").read_text(encoding="utf-8"))


def test_the_best_checkpoint_survives(
    tiny_config: TinyConfig, tmp_path: Path, synthetic_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_in_turn(monkeypatch, 0.2, 0.7, 0.7, 0.1, 0.3)
    config = with_output(
        tiny_config,
        tmp_path / "run",
        eval__data=str(synthetic_data),
        eval__every=1,
        train__steps=5,
        train__keep_checkpoints=1,
    )
    run = train(config)
    assert best_of(run) == {"step": 2, "score": 0.7}
    kept = sorted(path.name for path in (run.folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000005"]


@pytest.mark.parametrize("dataset", ["synthetic", "davis2016"])
def test_every_score_may_decide(
    dataset: Any, synthetic_data: Path, tiny_config: TinyConfig
) -> None:
    names = held_out._score_names(held_out.PROTOCOLS[dataset])
    assert held_out._METRICS[dataset] in names
    model = SMTC(tiny_config().model)
    for metric in (None, names[-1]):
        config = EvalConfig(data=str(synthetic_data), dataset=dataset, metric=metric)
        held = HeldOut(config, ALONE)
        found = held.score(model)
        assert list(found) == names
        assert held.metric == metric or metric is None
        assert 0 <= found[held.metric] <= 1


def test_the_metric_named_is_the_score(scored: Config, tiny_config: TinyConfig) -> None:
    davis = {"eval__dataset": "davis2016", "eval__metric": "best_slot_f_frames"}
    config = with_output(
        tiny_config,
        Path(str(scored.output)),
        eval__data=scored.eval.data,
        eval__every=1,
        train__steps=1,
        **davis,
    )
    line = train(config).metrics[0]
    assert line["score"] == line["eval/best_slot_f_frames"]
    assert "eval/j_sequences" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"eval__metric": "accuracy"},
            "no score 'accuracy' for eval.metric; there are ari, fg_iou",
        ),
        ({"eval__metric": "fg_iou", "eval__dataset": "davis2016"}, "there are j_frames"),
        ({"eval__data": "/nowhere"}, "There is no folder /nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tiny_config: TinyConfig,
    tmp_path: Path,
    synthetic_data: Path,
    settings: dict[str, Any],
    said: str,
) -> None:
    given = {"eval__data": str(synthetic_data), "eval__every": 2} | settings
    with pytest.raises(UserError, match=said):
        train(with_output(tiny_config, tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_all_masks(tiny_config: TinyConfig, tmp_path: Path, videos: Path) -> None:
    masks = sorted((videos / "Annotations" / "480p").glob("*/*.png"))
    masks[3].unlink()
    config = with_output(tiny_config, tmp_path / "run", eval__data=str(videos), eval__every=2)
    with pytest.raises(UserError, match="holds 7 masks"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_method_without_masks_cannot_be_scored(
    tiny_config: TinyConfig, tmp_path: Path, synthetic_data: Path
) -> None:
    given = {"eval__data": str(synthetic_data), "eval__every": 2}
    with pytest.raises(UserError, match="no masks to score"):
        train(with_output(tiny_config, tmp_path / "run", **given), method=Line())
    assert not (tmp_path / "run").exists()


def test_a_score_that_should_be_small_makes_no_checkpoint_the_best(synthetic_data: Path) -> None:
    config = EvalConfig(data=str(synthetic_data), metric="identity_switch_rate")
    with pytest.raises(UserError, match="no score 'identity_switch_rate'"):
        HeldOut(config, ALONE)


# Many processes.


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_processes_share_the_videos(
    tiny_config: TinyConfig, synthetic_data: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Six videos; with seven processes one has nothing to do."""
    model = SMTC(tiny_config().model)
    config = EvalConfig(data=str(synthetic_data))
    expected = HeldOut(config, ALONE).score(model)
    parts: list[Any] = []
    seen: list[int] = []
    segment_frames = held_out.segment_frames

    def watched(*arguments: Any) -> Iterator[FrameSegmentation]:
        seen[-1] += 1
        return segment_frames(*arguments)

    monkeypatch.setattr(held_out, "segment_frames", watched)
    # First all give what they have, then all get what all gave.
    monkeypatch.setattr(held_out.distributed, "gather", lambda mine: parts.append(mine) or [])
    for rank in range(size):
        seen.append(0)
        with pytest.raises((IndexError, UserError)):
            HeldOut(config, World(torch.device("cpu"), rank, size)).score(model)
    assert sum(seen) == 6 and max(seen) - min(seen) <= 1
    monkeypatch.setattr(held_out.distributed, "gather", lambda _: parts)
    seen.append(0)
    assert HeldOut(config, World(torch.device("cpu"), size - 1, size)).score(model) == expected


def test_a_video_may_be_longer_than_the_others(
    tiny_config: TinyConfig, tmp_path: Path, synthetic_data: Path
) -> None:
    """A data set of one video whose frames are no multiple of the model's window."""
    for kind in ("JPEGImages", "Annotations"):
        folder = synthetic_data / kind / "480p"
        first = sorted(path.name for path in folder.iterdir())[0]
        shutil.copytree(folder / first, tmp_path / kind / "480p" / "one")
        sorted((tmp_path / kind / "480p" / "one").iterdir())[-1].unlink()
    found = HeldOut(EvalConfig(data=str(tmp_path)), ALONE).score(SMTC(tiny_config().model))
    assert found.pop("identity_switch_rate") >= 0 or found["id_coverage"] == 0
    assert all(np.isfinite(value) for value in found.values())
