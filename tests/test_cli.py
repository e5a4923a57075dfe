"""`smtc`: its settings from preset, file and flags, its help, and every command once."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from commands import Command, frames_of, train_flags

import smtc
from smtc import presets
from smtc.cli_parsing import parse_config
from smtc.config import Config, from_dict
from smtc.errors import UserError
from smtc.inference import PRESETS
from smtc.segment_video import Summary
from smtc.weights import load_model


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, as flags write them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from leaves(value, name + ".")
        else:
            yield name


def words(text: str) -> str:
    """Help without boxes and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# Settings.


def test_without_flags_a_run_is_the_preset_fixed() -> None:
    assert parse_config([]) == presets.fixed()


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_taken_as_it_is(name: str) -> None:
    assert parse_config(["--preset", name]) == presets.get(name)
    assert parse_config([f"--preset={name}"]) == presets.get(name)


def test_flags_are_typed_and_nested() -> None:
    arguments = ["--train.steps", "7", "--model.resolution", "64", "96", "--optim.clip-norm", "0.5"]
    arguments += ["--model.backbone.weights", "dino.pth", "--teacher.scope=head"]
    arguments += ["--data.random-gap", "--train.threads", "None"]
    config = parse_config(["--preset", "tiny", *arguments])
    assert (config.train.steps, config.model.resolution) == (7, (64, 96))
    assert (config.optim.clip_norm, config.model.backbone.weights) == (0.5, "dino.pth")
    assert (config.teacher.scope, config.data.random_gap) == ("head", True)
    assert config.train.threads is None
    assert config.optim.lr == presets.tiny().optim.lr


def test_short_names_of_data_and_output() -> None:
    config = parse_config(["--data", "videos", "--output=runs/a"])
    assert (config.data.root, config.output) == ("videos", "runs/a")
    assert parse_config(["--data=videos"]) == parse_config(["--data.root", "videos"])


def test_a_file_ranks_between_preset_and_flags(tmp_path: Path) -> None:
    file = write(
        tmp_path / "settings.toml",
        'method = "smtc"\noutput = "runs/file"\n'
        "[train]\nsteps = 9\nbatch = 3\n"
        "[model]\nresolution = [64, 64]\n"
        "[optim]\nlr = 1\n",
    )
    arguments = ["--train.batch", "5", "--config", str(file), "--preset", "tiny"]
    config = parse_config(arguments)
    assert (config.train.steps, config.train.batch, config.optim.lr) == (9, 5, 1.0)
    assert (config.output, config.model.resolution) == ("runs/file", (64, 64))
    assert config.train.threads == 1
    assert isinstance(config.optim.lr, float)


def test_a_file_may_write_dashes(tmp_path: Path) -> None:
    file = write(
        tmp_path / "settings.toml",
        "[train]\nlog-every = 3\n[model.backbone]\ndrop-path = 0.25\n[data]\nmax-bad-share = 0.5\n",
    )
    config = parse_config([f"--config={file}"])
    assert (config.train.log_every, config.model.backbone.drop_path) == (3, 0.25)
    assert config.data.max_bad_share == 0.5


def test_a_runs_settings_can_be_given_as_a_file(tiny_run: Path, tmp_path: Path) -> None:
    """Every setting has a place in TOML."""
    flat = json.loads((tiny_run / "config.json").read_text(encoding="utf-8"))

    def table(values: dict[str, Any], path: str) -> list[str]:
        plain = {k: v for k, v in values.items() if not isinstance(v, dict) and v is not None}
        lines = [f"[{path}]"] if path else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for key, value in values.items():
            if isinstance(value, dict):
                lines += table(value, f"{path}.{key}".strip("."))
        return lines

    file = write(tmp_path / "all.toml", "\n".join(table(flat, "")))
    config = parse_config(["--preset", "tiny", "--config", str(file)])
    assert config == from_dict(Config, flat)


@pytest.mark.parametrize("flag", ["--preset", "--config"])
def test_a_flag_without_a_value(refused: Command, flag: str) -> None:
    assert f"{flag} needs a value" in refused("train", flag)


# Help.


def test_help_of_train_names_every_setting(cli: Command) -> None:
    told = cli("train", "--help")
    assert told.code == 0
    for name in [*leaves(presets.fixed()), "preset", "config"]:
        assert f"--{name}" in told.out, name
    for name in presets.PRESETS:
        assert name in told.out
    assert "Sinkhorn's entropic regularisation. (default: 0.05)" in words(told.out)


def test_help_shows_the_defaults_of_the_preset(cli: Command) -> None:
    assert "--train.batch INT Clips a step and process. (default: 128)" in words(
        cli("train", "--preset", "paper", "--help").out
    )


@pytest.mark.parametrize("flags", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_command(cli: Command, flags: tuple[str, ...]) -> None:
    told = cli(*flags)
    assert told.code == 0
    data = ("data synthesize", "data inspect", "data preview", "data pack")
    for name in ("train", "segment", "evaluate discovery", *data, "convert", "bench data"):
        assert re.search(rf"^  smtc {name} +\w", told.out, re.MULTILINE), name


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("segment", ["--checkpoint", "--output", "--preset", "--device"]),
        (
            "evaluate discovery",
            ["--data", "--output", "--dataset", "--checkpoint", "--untrained", "--seed"],
        ),
        ("data synthesize", ["--videos", "--frames", "--size", "--seed", "--difficulty"]),
        ("data inspect", ["--output", "--frames", "--workers"]),
        ("data preview", ["--output", "--clips", "--step"]),
        ("data pack", ["--output", "--size", "--keep-aspect", "--antialias", "--workers"]),
        ("convert", ["--help"]),
    ],
)
def test_each_command_has_help(cli: Command, command: str, flags: list[str]) -> None:
    told = cli(*command.split(), "--help")
    assert told.code == 0
    assert f"smtc {command}" in told.out
    for flag in flags:
        assert flag in told.out


@pytest.mark.parametrize("group", ["evaluate", "data"])
def test_a_group_names_its_commands(cli: Command, group: str) -> None:
    told = cli(group)
    assert told.code == 0
    assert f"smtc {group}" in told.out


@pytest.mark.parametrize(
    ("command", "near"),
    [
        ("trian", "train"),
        ("evaluate discovry", "evaluate discovery"),
        ("data synthesise", "data synthesize"),
        ("segmnt", "segment"),
    ],
)
def test_an_unknown_command_shows_the_nearest(refused: Command, command: str, near: str) -> None:
    assert f"did you mean '{near}'?" in refused(*command.split())


def test_a_command_like_no_other_shows_all(refused: Command) -> None:
    assert "there are train, segment, evaluate discovery" in refused("xyzzy")


# Every command.


def test_data_synthesize(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    command = ["data", "synthesize", folder, "--videos", 2, "--frames", 3, "--size", 32]
    told = cli(*command, "--seed", 5)
    assert told.code == 0
    assert told.out == f"2 videos are in {folder}.\n"
    for kind in ("JPEGImages", "Annotations", "Categories"):
        files = [path for path in (folder / kind).rglob("*") if path.is_file()]
        assert len(files) == 6
    assert json.loads((folder / "synthetic.json").read_text())["seed"] == 5
    assert cli(*command, "--seed", 5).code == 0


def test_train_then_segment_then_evaluate(
    cli: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    told = cli(*train_flags(synthetic_data, run))
    assert told.code == 0
    assert told.out == f"The run is in {run}, its model in {run / 'model'}.\n"
    assert (run / "model" / "model.safetensors").exists()

    frames = synthetic_data / "JPEGImages" / "480p" / "00002"
    found = tmp_path / "found"
    told = cli("segment", frames, "--checkpoint", run, "--output", found, "--device", "cpu")
    assert told.code == 0
    assert str(found) in told.out
    made = {path.name for path in found.iterdir()}
    assert made == {".smtc", "masks", "overlay.mp4", "scores.json"}
    masks = sorted((found / "masks").rglob("*.png"))
    assert [path.name for path in masks] == [f"{i:05d}.png" for i in range(8)]
    assert cv2.imread(str(masks[0])).shape == (32, 32, 3)

    scores = tmp_path / "scores"
    command = ["evaluate", "discovery", "--data", synthetic_data, "--output", scores]
    told = cli(*command, "--checkpoint", run, "--device", "cpu")
    assert told.code == 0
    names = sorted(path.name for path in scores.iterdir())
    assert names == [".smtc", "manifest.json", "results.csv", "results.json", "sheet.png"]
    results = json.loads((scores / "results.json").read_text(encoding="utf-8"))
    assert {"ari", "fg_iou", "miou", "fg_ari"} <= results.keys()
    shown = [float(number) for number in re.findall(r"-?\d+\.\d+", told.out)]
    assert any(number == pytest.approx(results["miou"], abs=1e-3) for number in shown)
    manifest = (scores / "manifest.json").read_text(encoding="utf-8")
    assert str(run) in manifest


def test_segment_takes_preset_and_flags(
    cli: Command,
    tiny_run: Path,
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {}

    def record(model: Any, video: Any, output: Path, **options: Any) -> Summary:
        asked.update(options, frames=len(video), training=model.training, output=output)
        summary = Summary()
        summary.add({3: 0.9})
        summary.add({3: 0.8, 7: 0.6})
        return summary

    monkeypatch.setattr("smtc.segment_video.segment_video", record)
    command = ["segment", frames_of(synthetic_data, "00000"), "--checkpoint", tiny_run / "model"]
    command += ["--device", "cpu", "--output", tmp_path / "found"]
    told = cli(*command)
    assert told.code == 0 and "2 objects in 2 frames" in told.out
    assert asked["preset"] == PRESETS["default"] and not asked["training"]
    assert (asked["frames"], asked["output"]) == (8, tmp_path / "found")
    assert (asked["maps"], asked["rate"], asked["batch"]) == ("instance", None, 4)
    more = "--preset official --score 0.7 --area 0.02 --max-objects 9 --resolution 64 96 --seed 5"
    more += " --precision bf16 --maps semantic --fps 12.5 --batch 2"
    assert cli(*command, *more.split()).code == 0
    assert asked["preset"] == dataclasses.replace(
        PRESETS["official"],
        similarity=0.7,
        min_object=0.02,
        max_objects=9,
        size=(64, 96),
        seed=5,
        precision="bf16",
    )
    assert (asked["maps"], asked["rate"], asked["batch"]) == ("semantic", 12.5, 2)


def test_evaluate_an_untrained_model_by_seed(
    cli: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    def scores(name: str, seed: int) -> dict[str, Any]:
        command = ["evaluate", "discovery", "--data", synthetic_data, "--output", tmp_path / name]
        told = cli(*command, "--untrained", "tiny", "--seed", seed, "--device", "cpu")
        assert told.code == 0
        return json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))

    first = scores("first", 0)
    assert first == scores("again", 0)
    assert first["ari"] != scores("other", 1)["ari"]
    manifest = (tmp_path / "other" / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(manifest)["seeds"] == [1]


def test_train_on_real_frames(cli: Command, davis2016: Path, tmp_path: Path) -> None:
    told = cli(*train_flags(davis2016, tmp_path / "run", "--train.steps", 1))
    assert told.code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["loss"] > 0


def test_convert(cli: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = smtc.SMTC(presets.official_v2().model).state_dict()
    torch.save({"iteration": 1, "model_state_dict": names}, tmp_path / "authors.pth")
    told = cli("convert", tmp_path / "authors.pth", tmp_path / "model")
    assert told.code == 0
    assert "174 tensors taken" in told.out
    torch.testing.assert_close(dict(load_model(tmp_path / "model").state_dict()), dict(names))


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """From anywhere, in a process of its own: one sentence, exit code 2."""
    command = [sys.executable, "-m", "smtc"]
    done = subprocess.run([*command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "smtc train" in done.stdout
    bad = [*command, "train", "--preset", "tinny"]
    done = subprocess.run(bad, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "smtc: There is no preset 'tinny'; did you mean 'tiny'?\n"


@pytest.mark.parametrize("arguments", ["--help", "segment --help", "train --help"])
def test_a_reader_that_has_gone_is_no_error(arguments: str) -> None:
    """As in `smtc train --help | head`, with output that fits into a buffer and that does not."""
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "smtc", *arguments.split()]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=written, stderr=subprocess.PIPE, env=buffered, text=True, check=False
    )
    os.close(written)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom smtc.cli import main\nmain(['--help'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_the_package_offers_its_names() -> None:
    for name in smtc.__all__:
        assert getattr(smtc, name) is not None
    assert issubclass(smtc.UserError, ValueError) and smtc.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        smtc.tain  # noqa: B018
