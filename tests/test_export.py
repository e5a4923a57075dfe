import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, TinyConfig, changed, tree
from torch import Tensor

from smtc import export as module
from smtc.backbones import build_encoder
from smtc.config import BackboneConfig
from smtc.export import ParityError, export
from smtc.inference import InferenceSettings, predict
from smtc.model import SMTC
from smtc.weights import checkpoint_hash, load_model, save_encoder, save_model

ONNX = ("onnx", "onnxscript", "onnxruntime")
WITHOUT_SMTC = "import sys; sys.modules['smtc'] = None"


def needs_onnx() -> None:
    for name in ONNX:
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'smtc[onnx]')")


def lines_of(out: str) -> list[str]:
    """The three lines that the command printed."""
    after = out.split("three lines run it:\n")[1]
    return [line.strip() for line in after.splitlines()[:3]]


def run_alone(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run lines where this package cannot be imported."""
    code = "\n".join([WITHOUT_SMTC, *lines])
    return subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def loaded(folder: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    return torch.export.load(folder / "model.pt2").module()


def agree(
    run: Callable[[Tensor], dict[str, Tensor]],
    model: SMTC,
    settings: InferenceSettings,
    batch: int,
) -> None:
    """What the file makes of RGB in [0, 1] is what `predict` makes of the same bytes."""
    height, width = settings.size or model.config.resolution
    frames = np.random.default_rng(7).integers(0, 256, (4 * batch, height, width, 3), np.uint8)
    wanted = predict(model, frames, settings=settings, batch=batch)
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).unflatten(0, (batch, 4)) / 255
    found = run(clip)
    assert list(found) == ["semantic", "instance", "scores"]
    for name, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.flatten(0, 1), getattr(wanted, name), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the tiny run; not to be changed."""
    return export(tiny_run, tmp_path_factory.mktemp("export") / "out").folder


def test_the_three_lines_that_are_printed_run_with_torch_alone(
    cli: Command, tiny_run: Path, tmp_path: Path
) -> None:
    told = cli("export", tiny_run, tmp_path / "out")
    assert told.code == 0, told.error
    assert sorted(tree(tmp_path / "out")) == [".smtc", "config.json", "model.pt2"]
    lines = lines_of(told.out)
    assert lines[0] == "import torch"
    done = run_alone([*lines, "print({k: list(v.shape) for k, v in masks.items()})"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == (
        "{'semantic': [1, 4, 8, 4, 4], 'instance': [1, 4, 8, 4, 4, 4], 'scores': [1, 4, 8, 4]}"
    )
    # The guard of this test: where it ran, this package was out of reach.
    assert "smtc" in run_alone(["import smtc"], tmp_path).stderr


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_gives_what_the_model_gives(exported: Path, tiny_run: Path, batch: int) -> None:
    agree(loaded(exported), load_model(tiny_run), InferenceSettings(), batch)


@pytest.mark.slow
def test_another_size_and_other_iterations(tiny_run: Path, tmp_path: Path) -> None:
    folder = export(tiny_run, tmp_path / "out", height=48, width=64, iterations=5).folder
    settings = InferenceSettings(size=(48, 64), iterations=5)
    agree(loaded(folder), load_model(tiny_run), settings, 1)
    told = json.loads((folder / "config.json").read_text())
    assert (told["size"], told["iterations"]) == ([48, 64], 5)
    assert told["outputs"]["instance"]["shape"] == ["batch", 4, 8, 4, 6, 8]


@pytest.mark.parametrize(
    "settings",
    [
        {
            "update": "gru",
            "semantic_mask": "logits>0.3",
            "embedding": "raw",
            "fusion_head": "linear",
        },
        {"gradient": "full", "slots": 3, "instances": 1, "backbone.position_embedding": "learned"},
        pytest.param(
            {
                "backbone": BackboneConfig(architecture="resnet50", feature="tokens"),
                "resolution": (64, 64),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param({"backbone.architecture": "vit_small"}, marks=pytest.mark.slow),
    ],
    ids=["gru", "full", "resnet50", "vit_small"],
)
def test_every_kind_of_model(
    settings: dict[str, Any], tiny_config: TinyConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = SMTC(changed(tiny_config().model, settings))
    save_model(model, tmp_path / "model")
    size = 64, 32
    folder = export(tmp_path / "model", tmp_path / "out", height=size[0], width=size[1]).folder
    agree(loaded(folder), model, InferenceSettings(size=size), 2)


def test_the_graph_holds_torchs_own_operations_and_the_noise_as_a_constant(
    exported: Path, tiny_run: Path
) -> None:
    program = torch.export.load(exported / "model.pt2")
    targets = [
        node.target
        for part in program.graph_module.modules()
        for node in getattr(part, "graph", torch.fx.Graph()).nodes
        if node.op == "call_function"
    ]
    operations = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    assert len(operations) > 50
    assert {operation.namespace for operation in operations} == {"aten"}
    # Drawing it would take shifts and logarithms.
    names = {operation._schema.name for operation in operations}
    assert not names & {"aten::__rshift__", "aten::log", "aten::cos", "aten::randn"}
    noise = load_model(tiny_run).inference_noise(torch.device("cpu"))
    assert torch.equal(program.state_dict["noise"], noise)
    assert program.example_inputs is None  # they would be megabytes


def test_the_settings_say_what_a_user_needs(exported: Path, tiny_run: Path) -> None:
    told = json.loads((exported / "config.json").read_text())
    assert told["window"] == 4
    assert told["size"] == [32, 32]
    assert told["iterations"] == 3
    assert (told["mean"], told["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert told["inputs"]["clip"]["shape"] == ["batch", 4, 3, 32, 32]
    assert told["outputs"]["semantic"]["shape"] == ["batch", 4, 8, 4, 4]
    assert told["outputs"]["scores"]["shape"] == ["batch", 4, 8, 4]
    assert told["weights_sha256_16"] == checkpoint_hash(tiny_run)
    assert told["versions"]["torch"] == torch.__version__
    differences = told["largest_differences"]["model.pt2"]
    assert list(differences) == ["semantic", "instance", "scores"]
    assert all(0 <= value <= 1e-4 for value in differences.values())
    # To be run inside the folder, wherever it went.
    assert told["examples"] == {"model.pt2": module.example("torch", "", (32, 32))}


def test_no_file_names_a_place_on_this_machine(exported: Path) -> None:
    places = [str(Path(module.__file__).parent.parent), sys.prefix, str(exported.parent)]
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents.append((exported / "config.json").read_bytes())
    assert sum(map(len, contents)) > 100_000
    assert not [place for place in places for content in contents if place.encode() in content]


def test_an_earlier_export_is_replaced_and_kept_where_the_new_one_fails(
    cli: Command, exported: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    export(tiny_run, out, iterations=2)
    assert json.loads((out / "config.json").read_text())["iterations"] == 2

    monkeypatch.setattr(module, "IMAGENET_MEAN", (0.485, 0.456, 0.5))
    told = cli("export", tiny_run, out)
    assert told.code == 1
    assert "smtc: model.pt2 differs from the model by more than 0.0001 (semantic " in told.error
    assert told.out == ""
    assert json.loads((out / "config.json").read_text())["iterations"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def spoilt(
    model: SMTC, shape: module._Shape, wrong: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A file's function whose results `wrong` spoils, given the number of the call."""
    discovery = module.Discovery(model, shape.iterations)
    calls = iter(range(100))
    return lambda clip: wrong(next(calls), discovery(clip))


@pytest.mark.parametrize("name", ["semantic", "instance", "scores"])
@pytest.mark.parametrize("by", [2e-4, float("nan")])
def test_one_wrong_value_in_any_output_is_noticed(tiny_run: Path, name: str, by: float) -> None:
    model, shape = load_model(tiny_run).requires_grad_(False), module._Shape((32, 32), 3)

    def wrong(_: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs[name].flatten()[7] += by
        return outputs

    with pytest.raises(ParityError, match=rf"model\.pt2 differs .*{name} "):
        module._compare(spoilt(model, shape, wrong), model, shape, "model.pt2")


def test_a_position_on_the_threshold_does_not_condemn_a_file(tiny_run: Path) -> None:
    model, shape = load_model(tiny_run).requires_grad_(False), module._Shape((32, 32), 3)

    batches = []

    def wrong(call: int, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batches.append(len(outputs["scores"]))
        if call < 2:  # the first draw
            outputs["instance"] += 1e-3
        return outputs

    found = module._compare(spoilt(model, shape, wrong), model, shape, "model.pt2")
    assert 0 < found["instance"] <= 1e-5
    # Others than the two clips that a file is traced with.
    assert batches == [1, 3, 1, 3]


# Mistakes.


def test_what_is_no_model_is_refused(
    safe: Command, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    assert f"There is no file or folder {tmp_path / 'none'};" in safe(
        "export", tmp_path / "none", tmp_path / "out"
    )
    save_encoder(build_encoder(tiny_config().model.backbone), tmp_path / "encoder")
    said = safe("export", tmp_path / "encoder", tmp_path / "out")
    assert "holds an encoder only" in said and "train SMTC on it" in said


def test_a_folder_with_other_files_is_refused(
    safe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt2").write_text("mine")
    said = safe("export", tiny_run, tmp_path / "out")
    assert "already holds 'model.pt2'; choose another output folder" in said
    assert (tmp_path / "out" / "model.pt2").read_text() == "mine"
    said = safe("export", tiny_run, tmp_path / "out" / "model.pt2")
    assert "model.pt2 is a file" in said


def test_where_nothing_can_be_written(safe: Command, tiny_run: Path, read_only: Path) -> None:
    assert "cannot be written" in safe("export", tiny_run, read_only / "out")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--height", 60], "--height 60 cannot be cut into this model's patches of 8 pixels; give"),
        (["--width", 0], "--width 0 cannot be cut"),
        (["--height", -8], "--height -8 cannot be cut"),
        (["--iterations", 0], "--iterations 0 is too few; give 1 or more."),
        (["--format", "tflite"], "tflite"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    safe: Command, tiny_run: Path, tmp_path: Path, flags: list[object], sentence: str
) -> None:
    assert sentence in safe("export", tiny_run, tmp_path / "out", *flags)


def test_onnx_without_its_packages_is_refused(
    safe: Command, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ONNX_PACKAGES", ("json", "no_such_package", "nor_this"))
    said = safe("export", tiny_run, tmp_path / "out", "--format", "onnx")
    assert "ONNX needs no_such_package and nor_this, which cannot be imported here" in said
    assert 'pip install "smtc[onnx]", or use --format torch' in said


@pytest.mark.parametrize("command", ["export", "convert"])
def test_help_starts_with_a_sentence_and_an_example(cli: Command, command: str) -> None:
    said = cli(command, "--help").out.split("\n\n")
    assert said[0].startswith(f"usage: smtc {command}")
    assert said[1].endswith(".")
    assert said[2].startswith(f"For example: smtc {command} ")


# ONNX.


def test_the_onnx_file_is_the_model_too(cli: Command, tiny_run: Path, tmp_path: Path) -> None:
    needs_onnx()
    out = tmp_path / "out"
    told = cli("export", tiny_run, out, "--format", "onnx")
    assert told.code == 0, told.error
    assert sorted(tree(out)) == [".smtc", "config.json", "model.onnx"]
    agree(module._load_onnx(out / "model.onnx"), load_model(tiny_run), InferenceSettings(), 5)
    done = run_alone([*lines_of(told.out), "print(instance.shape)"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 4, 8, 4, 4, 4)"
    assert "onnxscript" in json.loads((out / "config.json").read_text())["versions"]


def test_both_files_of_one_model(tiny_run: Path, tmp_path: Path) -> None:
    needs_onnx()
    found = export(tiny_run, tmp_path / "out", form="both", height=48)
    assert list(found.differences) == ["model.pt2", "model.onnx"]
    assert sorted(tree(tmp_path / "out")) == [".smtc", "config.json", "model.onnx", "model.pt2"]
    for run in (loaded(found.folder), module._load_onnx(found.folder / "model.onnx")):
        agree(run, load_model(tiny_run), InferenceSettings(size=(48, 32)), 1)
