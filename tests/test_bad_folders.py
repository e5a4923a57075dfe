"""Outputs that cannot be written and weights that cannot be read: one sentence, exit code 2."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command, TinyConfig, frames_of, train_flags, tree

from smtc.training.trainer import train

# The output folder.


def test_an_output_folder_with_something_else(
    safe: Command, synthetic_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.tex").write_text("precious", encoding="utf-8")
    weights = ["--checkpoint", tiny_run, "--output", output, "--device", "cpu"]
    commands = [
        train_flags(synthetic_data, output),
        ["segment", frames_of(synthetic_data, "00000"), *weights],
        ["evaluate", "discovery", "--data", synthetic_data, *weights],
        ["data", "synthesize", output, "--videos", 1, "--size", 32],
    ]
    for command in commands:
        said = safe(*command)
        assert str(output) in said and re.search("another|something else", said), said
    assert (output / "chapter1.tex").read_text(encoding="utf-8") == "precious"


def test_a_run_of_other_settings(
    safe: Command, cli: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    command = train_flags(synthetic_data, tmp_path / "run")
    assert cli(*command).code == 0
    said = safe(*command, "--optim.lr", 0.5, "--train.log-every", 7)
    assert "holds a run with other settings: optim.lr 0.008 (now 0.5);" in said
    assert cli(*command, "--train.log-every", 7).code == 0


def test_an_output_that_is_a_file(
    safe: Command, synthetic_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "file"
    output.write_text("precious", encoding="utf-8")
    weights = ["--checkpoint", tiny_run, "--output", output, "--device", "cpu"]
    for command in (
        train_flags(synthetic_data, output),
        ["segment", frames_of(synthetic_data, "00000"), *weights],
        ["evaluate", "discovery", "--data", synthetic_data, *weights],
        ["data", "synthesize", output, "--videos", 1, "--size", 32],
    ):
        assert str(output) in safe(*command)
    assert output.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("inner", ["", "new"])
def test_an_output_folder_that_is_not_writable(
    safe: Command, synthetic_data: Path, tiny_run: Path, read_only: Path, inner: str
) -> None:
    output = read_only / inner
    weights = ["--checkpoint", tiny_run, "--output", output, "--device", "cpu"]
    for command in (
        train_flags(synthetic_data, output),
        ["segment", frames_of(synthetic_data, "00000"), *weights],
        ["evaluate", "discovery", "--data", synthetic_data, *weights],
        ["data", "synthesize", output, "--videos", 1, "--size", 32],
    ):
        said = safe(*command)
        assert str(output) in said and "written" in said, said


@pytest.mark.parametrize("size", ["8k", "24k", "1m"])
def test_a_disk_that_fills_up_in_training(
    refused: Command, mounted: Callable[[str], Path], synthetic_data: Path, size: str
) -> None:
    """With its settings, its first lines, or its first checkpoint."""
    output = mounted(f"size={size}") / "run"
    flags = ["--train.log-every", 1, "--train.steps", 3]
    said = refused(*train_flags(synthetic_data, output, *flags))
    assert str(output) in said and "No space left" in said
    assert not [path for path in tree(output) if "partial" in path]
    assert not (output / "model").exists()
    assert not list(output.glob("checkpoints/*"))


@pytest.mark.parametrize("size", ["16k", "32k"])
def test_a_disk_that_fills_up_with_results(
    refused: Command,
    mounted: Callable[[str], Path],
    synthetic_data: Path,
    tiny_run: Path,
    size: str,
) -> None:
    folder = mounted(f"size={size}")
    weights = ["--checkpoint", tiny_run, "--output", folder / "out", "--device", "cpu"]
    for command in (
        ["segment", frames_of(synthetic_data, "00000"), *weights],
        ["evaluate", "discovery", "--data", synthetic_data, *weights],
        ["data", "synthesize", folder / "out", "--videos", 6, "--size", 32],
    ):
        said = refused(*command)
        assert str(folder / "out") in said and "No space left" in said, said
        assert tree(folder) == []


# Weights.


@pytest.fixture(scope="module")
def warm_run(tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished warm start."""
    output = str(tmp_path_factory.mktemp("warm") / "run")
    config = tiny_config({"train.steps": 1, "output": output}, preset="tiny_encoder")
    return train(config).folder


@pytest.fixture
def bad_weights(tiny_run: Path, warm_run: Path, tmp_path: Path) -> dict[str, Path]:
    """A name for what is wrong to the file or folder."""
    whole = (tiny_run / "model" / "model.safetensors").read_bytes()
    made = {
        "missing": tmp_path / "nothing.safetensors",
        "truncated": tmp_path / "truncated.safetensors",
        "empty": tmp_path / "empty.pth",
        "text": tmp_path / "notes.pth",
        "image": tmp_path / "image.safetensors",
        "no model": tmp_path / "some folder",
        "other tensors": tmp_path / "other.pth",
        "unfinished": tmp_path / "unfinished",
        "another architecture": tmp_path / "another",
    }
    made["truncated"].write_bytes(whole[: len(whole) // 2])
    made["empty"].write_bytes(b"")
    made["text"].write_text("not a checkpoint", encoding="utf-8")
    made["image"].write_bytes(b"\xff\xd8\xff\xe0 some JPEG \xff\xd9")
    made["no model"].mkdir()
    torch.save({"layer.weight": torch.zeros(2, 2)}, made["other tensors"])
    shutil.copytree(tiny_run, made["unfinished"], ignore=shutil.ignore_patterns("model"))
    shutil.copytree(tiny_run / "model", made["another architecture"])
    file = made["another architecture"] / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["model"]["slots"] = 5
    file.write_text(json.dumps(settings), encoding="utf-8")
    return made


KINDS = [
    "missing",
    "truncated",
    "empty",
    "text",
    "image",
    "no model",
    "other tensors",
    "unfinished",
]


@pytest.mark.parametrize("kind", [*KINDS, "another architecture"])
def test_weights_that_cannot_be_segmented_or_scored_with(
    safe: Command, bad_weights: dict[str, Path], synthetic_data: Path, tmp_path: Path, kind: str
) -> None:
    bad = bad_weights[kind]
    weights = ["--checkpoint", bad, "--output", tmp_path / "out", "--device", "cpu"]
    for command in (
        ["segment", frames_of(synthetic_data, "00000"), *weights],
        ["evaluate", "discovery", "--data", synthetic_data, *weights],
    ):
        said = safe(*command)
        assert said.startswith("smtc: ") and str(bad) in said, said


@pytest.mark.parametrize("flag", ["--init", "--model.backbone.weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_cannot_be_started_from(
    safe: Command,
    bad_weights: dict[str, Path],
    synthetic_data: Path,
    tmp_path: Path,
    kind: str,
    flag: str,
) -> None:
    bad = bad_weights[kind]
    said = safe(*train_flags(synthetic_data, tmp_path / "run", flag, bad))
    assert said.startswith("smtc: ") and str(bad) in said, said
    assert (kind == "unfinished") == ("a run that has not ended" in said)


def test_an_encoder_of_another_architecture(
    safe: Command, tiny_run: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    another = ["--model.backbone.weights", tiny_run, "--model.backbone.patch", 16]
    said = safe(*train_flags(synthetic_data, tmp_path / "run", *another))
    assert str(tiny_run / "model") in said
    assert "patch_embed.proj.weight is (64, 3, 8, 8) instead of (64, 3, 16, 16)" in said


MADE_OTHERWISE = [
    ("--model.slots 5", "model.slots 8 (the flags say 5); give --model.slots 8,"),
    ("--model.instances 2", "model.instances 4 (the flags say 2); give --model.instances 4,"),
    (
        "--model.resolution 64 48",
        "model.resolution 32 32 (the flags say 64 48); give --model.resolution 32 32,",
    ),
    (
        "--model.slots 5 --model.backbone.patch 16",
        "model.slots 8 (the flags say 5), model.backbone.patch 8 (the flags say 16); "
        "give --model.slots 8 --model.backbone.patch 8, or other weights.",
    ),
]


@pytest.mark.parametrize(("flags", "told"), MADE_OTHERWISE)
def test_starting_from_a_model_of_another_make(
    safe: Command, tiny_run: Path, synthetic_data: Path, tmp_path: Path, flags: str, told: str
) -> None:
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--init", tiny_run, *flags.split()))
    assert f"{tiny_run / 'model' / 'model.safetensors'} was made with {told}" in said, said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model.slots 5", "it was made with model.slots 8, not 5;"),
        ("--model.resolution 64 32", "it was made for a grid of 16 positions, not 32 (model.res"),
    ],
)
def test_where_only_shapes_tell(
    safe: Command, tiny_run: Path, synthetic_data: Path, tmp_path: Path, flags: str, told: str
) -> None:
    file = tmp_path / "copied.safetensors"
    shutil.copy(tiny_run / "model" / "model.safetensors", file)
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--init", file, *flags.split()))
    assert str(file) in said and told in said, said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model.slots 5", "model.slots 8 (now 5);"),
        ("--model.instances 2", "model.instances 4 (now 2);"),
        ("--model.resolution 64 48", "model.resolution 32 32 (now 64 48);"),
    ],
)
def test_going_on_with_a_model_of_another_make(
    safe: Command,
    cli: Command,
    synthetic_data: Path,
    tiny_run: Path,
    tmp_path: Path,
    flags: str,
    told: str,
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    said = safe(*train_flags(synthetic_data, tmp_path / "run", *flags.split()))
    assert f"{tmp_path / 'run'} holds a run with other settings: " in said and told in said, said


def test_an_encoder_alone_finds_no_objects(
    safe: Command, warm_run: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    weights = ["--checkpoint", warm_run, "--output", tmp_path / "out", "--device", "cpu"]
    said = safe("segment", frames_of(synthetic_data, "00000"), *weights)
    assert "holds an encoder only" in said and "--init" in said


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "text", "other tensors"])
def test_files_that_cannot_be_converted(
    safe: Command, bad_weights: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    bad = bad_weights[kind]
    assert str(bad) in safe("convert", bad, tmp_path / "model")


def test_a_run_whose_checkpoint_is_damaged(
    refused: Command, cli: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    command = train_flags(synthetic_data, tmp_path / "run")
    assert cli(*command).code == 0
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    assert "step_00000002 is damaged" in refused(*command)
