"""An evaluation that was stopped goes on with what is left, and ends as if it never had been."""

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command, frames_of, tree

from smtc.errors import UserError
from smtc.evaluation import discovery, kept_scores
from smtc.evaluation.datasets import EvaluationVideo
from smtc.evaluation.discovery import Evaluation, evaluate
from smtc.evaluation.kept_scores import KeptScores, key_of, stamps
from smtc.evaluation.methods import Inference, Method, model_methods
from smtc.evaluation.protocols import Found
from smtc.weights import load_model

FILES = ("results.json", "results.csv", "manifest.json", "sheet.png")
Watched = list[tuple[str, str, int]]


class Stopped(BaseException):
    """No mistake of the user's; as a signal that Python turns into an exception."""


@pytest.fixture
def evaluation(videos: Path, tiny_run: Path, tmp_path: Path) -> Evaluation:
    """Six videos, scored by a model, k-means (two seeds each) and a box: 30 records."""
    methods = model_methods(load_model(tiny_run), ["backbone", "centre-box"], Inference(), {})
    return Evaluation(
        methods=methods,
        dataset="synthetic",
        root=videos,
        output=tmp_path / "out",
        seeds=(0, 1),
    )


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """What is really looked for, as (method, video, seed)."""
    seen: Watched = []

    class Watching:
        def __init__(self, method: Method) -> None:
            self._find = method.find
            self._name = method.name

        def __call__(self, video: EvaluationVideo, size: tuple[int, int], seed: int) -> Found:
            seen.append((self._name, video.name, seed))
            return self._find(video, size, seed)

    init = Method.__init__

    def watched(self: Method, *arguments: Any) -> None:
        init(self, *arguments)
        self.find = Watching(self)  # type: ignore[method-assign]

    monkeypatch.setattr(Method, "__init__", watched)
    return seen


def hidden(evaluation: Evaluation) -> Path:
    return evaluation.output.with_name(f".{evaluation.output.name}.smtc-scored")


def stop_after(monkeypatch: pytest.MonkeyPatch, records: int, error: BaseException) -> None:
    write, left = KeptScores.write, [records]

    def counted(self: KeptScores, key: str, record: dict[str, Any]) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1
        write(self, key, record)

    monkeypatch.setattr(KeptScores, "write", counted)


def contents(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted([".smtc", *FILES])
    return {name: (folder / name).read_bytes() for name in FILES}


def stopped(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, records, Stopped())
        with pytest.raises(Stopped):
            evaluate(evaluation)


def test_only_what_is_left_is_scored_and_the_results_are_the_same(
    found: Watched,
    evaluation: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "smtc")
    whole = evaluate(evaluation)
    wanted = contents(evaluation.output)
    assert len(found) == len(set(found)) == 30 and not hidden(evaluation).exists()
    shutil.rmtree(evaluation.output)
    found.clear()
    stopped(evaluation, monkeypatch, 11)
    assert sorted(path.name for path in evaluation.output.parent.iterdir()) == [
        hidden(evaluation).name,
        "videos",
    ]
    assert len(list(hidden(evaluation).iterdir())) == 11
    stopped(evaluation, monkeypatch, 5)
    assert evaluate(evaluation) == whole
    assert contents(evaluation.output) == wanted
    assert len(found) == 32 and len(set(found)) == 30  # the two that were stopped, twice
    assert not hidden(evaluation).exists()
    told = [line for line in caplog.messages if "before" in line]
    assert told == [f"Going on: {n} of 30 were scored before." for n in (11, 16)]


KILLED = """
import sys, time
from smtc import cli
from smtc.evaluation.kept_scores import KeptScores
write = KeptScores.write
def slow(self, key, record):
    write(self, key, record)
    time.sleep(0.05)
KeptScores.write = slow
cli.main(sys.argv[1:])
"""


def test_a_killed_process_leaves_what_the_next_one_needs(
    cli: Command, videos: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """SIGKILL at a random moment, whatever is being written."""
    after = random.randint(1, 20)
    command = ["evaluate", "discovery", "--data", videos, "--checkpoint", tiny_run]
    command += ["--baselines", "backbone", "centre-box", "--seeds", 0, 1, "--device", "cpu"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert cli(*command, "--output", straight).code == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    line = [sys.executable, str(script), *map(str, command), "--output", str(killed)]
    scored = tmp_path / ".killed.smtc-scored"
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not scored.exists() or len(list(scored.glob("*.json"))) < after:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
    assert not killed.exists() and scored.exists()
    told = cli(*command, "--output", killed)
    assert told.code == 0
    assert contents(killed) == contents(straight)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed",
        "killed.py",
        "straight",
        "videos",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda old, model: {
            "methods": model_methods(model, ["centre-box"], Inference(batch=8), {})
        },
        lambda old, model: {"dataset": "davis2016"},
    ],
    ids=["another method", "another protocol"],
)
def test_what_is_the_same_in_other_settings_is_kept_and_all_else_removed(
    found: Watched,
    evaluation: Evaluation,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Evaluation, Any], dict[str, Any]],
) -> None:
    stopped(evaluation, monkeypatch, 15)  # three videos of six
    changes = change(evaluation, load_model(tiny_run))
    other = dataclasses.replace(evaluation, **changes)
    found.clear()
    evaluate(other)
    assert len(found) == (18 - 9 if "methods" in changes else 30)
    assert not hidden(evaluation).exists()


@pytest.mark.parametrize(
    ("given", "anew"),
    [
        (Inference(clusters=5), 12),
        (Inference(settings=dataclasses.replace(Inference().settings, precision="bf16")), 24),
        (Inference(settings=dataclasses.replace(Inference().settings, size=(64, 64))), 24),
    ],
)
def test_other_settings_start_anew(
    found: Watched,
    evaluation: Evaluation,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: Inference,
    anew: int,
) -> None:
    """But for methods that they do not concern."""
    stopped(evaluation, monkeypatch, 29)
    names = ["backbone", "centre-box"]
    methods = model_methods(load_model(tiny_run), names, given, {})
    found.clear()
    evaluate(dataclasses.replace(evaluation, methods=methods))
    assert len(found) == anew + 1


def test_other_weights_start_anew(
    found: Watched, evaluation: Evaluation, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(evaluation, monkeypatch, 29)
    model = load_model(tiny_run)
    model.transport_proj.bias.data[0] += 1e-6
    found.clear()
    evaluate(dataclasses.replace(evaluation, methods=model_methods(model, (), Inference(), {})))
    assert len(found) == 12


def test_another_version_starts_anew(
    found: Watched,
    evaluation: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "smtc")
    stopped(evaluation, monkeypatch, 15)
    found.clear()
    monkeypatch.setattr(discovery, "code_hash", lambda: "other")
    evaluate(evaluation)
    assert len(found) == 30
    assert "15 were scored with other settings, files or code: not used." in caplog.messages


@pytest.mark.parametrize("kind", ["JPEGImages", "Annotations"])
def test_only_a_sequence_with_another_file_is_scored_anew(
    found: Watched, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stopped(evaluation, monkeypatch, 29)
    file = next((evaluation.root / kind / "480p" / "00002").iterdir())
    later = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(later, later))
    found.clear()
    evaluate(evaluation)
    assert {video for _, video, _ in found} == {"00002", "00005"} and len(found) == 6


def test_a_damaged_record_is_scored_anew(
    found: Watched, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(evaluation)
    wanted = contents(evaluation.output)
    stopped(evaluation, monkeypatch, 20)
    first, second, *_ = hidden(evaluation).iterdir()
    first.write_text(first.read_text()[:-9])
    second.write_text("[]")
    (hidden(evaluation) / "half.partial").write_text("{")
    found.clear()
    evaluate(evaluation)
    assert len(found) == 12 and contents(evaluation.output) == wanted


def test_a_mistake_leaves_nothing_behind(evaluation: Evaluation) -> None:
    bad = frames_of(evaluation.root, "00003") / "00002.jpg"
    bad.write_bytes(b"")
    before = tree(evaluation.output.parent)
    with pytest.raises(UserError, match=r"00003/00002\.jpg"):
        evaluate(evaluation)
    assert tree(evaluation.output.parent) == before


def test_a_mistake_before_the_work_takes_nothing_away(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(evaluation, monkeypatch, 15)
    evaluation.output.write_text("in the way")
    with pytest.raises(UserError, match="is a file"):
        evaluate(evaluation)
    masks = evaluation.root / "Annotations"
    masks.rename(masks.with_name("elsewhere"))
    with pytest.raises(UserError, match="Annotations"):
        evaluate(evaluation)
    assert len(list(hidden(evaluation).iterdir())) == 15


def test_nothing_is_written_into_the_data(evaluation: Evaluation, videos: Path) -> None:
    before = tree(videos)
    evaluate(evaluation)
    assert tree(videos) == before
    for inside in (videos, videos / "JPEGImages" / "out"):
        with pytest.raises(
            UserError, match=r"lies inside the data folder .*videos; choose another"
        ):
            dataclasses.replace(evaluation, output=inside)


def test_a_link_to_the_output_is_followed(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    evaluation.output.symlink_to(tmp_path / "disk" / "real")
    stopped(evaluation, monkeypatch, 3)
    assert len(list((tmp_path / "disk" / ".real.smtc-scored").iterdir())) == 3
    evaluate(evaluation)
    assert os.listdir(tmp_path / "disk") == ["real"] and evaluation.output.is_symlink()
    assert contents(tmp_path / "disk" / "real")


def test_a_record_has_its_name_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptScores(tmp_path / "out")
    assert kept.begin(["a"]) == {}
    kept.write("a", {"scores": [0.1, None]})
    whole = {"a": {"scores": [0.1, None]}}
    assert kept.begin(["a"]) == whole

    def stop(self: Path, target: Path) -> None:
        assert json.loads(self.read_text()) == {"scores": []}
        raise Stopped

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(Stopped):
        kept.write("a", {"scores": []})
    assert len(list(kept.folder.iterdir())) == 2
    assert kept.begin(["a", "b"]) == whole
    assert [path.name for path in kept.folder.iterdir()] == ["a.json"]


def test_records_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ".out.smtc-scored").write_text("in the way")
    with pytest.raises(UserError, match=r"out cannot be written \(File exists\); free some space"):
        KeptScores(tmp_path / "out").begin([])


def test_keys_and_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "frame"
    file.write_bytes(b"123")
    assert stamps(tmp_path, [file]) == [["inner/frame", 3, file.stat().st_mtime_ns]]
    with pytest.raises(UserError, match=r"absent cannot be read .* complete the copy"):
        stamps(tmp_path, [tmp_path / "absent"])
    before = kept_scores.code_hash()
    assert before == kept_scores.code_hash()
    copy = tmp_path / "package"
    shutil.copytree(Path(str(kept_scores.pipelines.__file__)).parent, copy)
    monkeypatch.setattr(kept_scores.pipelines, "__file__", str(copy / "__init__.py"))
    assert kept_scores.code_hash() == before
    with (copy / "clips.py").open("a", encoding="utf-8") as opened:
        opened.write("#")
    assert kept_scores.code_hash() != before
