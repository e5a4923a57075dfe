"""A trained model as one file that runs without this package: by `torch.export`, and as ONNX.

What is exported takes frames as people have them, RGB in [0, 1], and gives soft masks: the
normalisation and the fixed noise of evaluation are constants inside.
"""

import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from smtc import __version__
from smtc.config import to_dict
from smtc.errors import UserError
from smtc.folders import whole_folder
from smtc.inference import WINDOW, InferenceSettings, predict
from smtc.model import SMTC
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD
from smtc.slots import slot_similarity
from smtc.weights import checkpoint_hash, load_model

Format = Literal["torch", "onnx", "both"]
Run = Callable[[Tensor], dict[str, Tensor]]

FILES: dict[str, str] = {"torch": "model.pt2", "onnx": "model.onnx"}
OUTPUTS = ("semantic", "instance", "scores")
TOLERANCE = 1e-4
"""The most by which an exported file may differ from the model, in any mask or score."""
_COMPARED = (1, 3)
"""Clips in the batches that are compared: others than the two it is traced with."""
_DRAWS = 3
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

_LOG = logging.getLogger("smtc")


class ParityError(RuntimeError):
    """An exported file that does not do what the model does."""


class Discovery(nn.Module):
    """What is exported: frames to the soft masks that `smtc segment` starts from."""

    mean: Tensor
    std: Tensor
    noise: Tensor

    def __init__(self, model: SMTC, iterations: int) -> None:
        super().__init__()
        self.model = model
        self.iterations = iterations
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.register_buffer("noise", model.inference_noise(torch.device("cpu")))

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """`clip [B,4,3,H,W]`, RGB in [0, 1], to `semantic [B,4,N,rows,columns]` (sums to 1 over N),
        `instance [B,4,N,P,rows,columns]` (sums to its semantic over P) and `scores [B,4,N,P]`.
        """
        output = self.model(
            (clip - self.mean) / self.std,
            self.noise.expand(clip.shape[0], WINDOW, -1, -1, -1),
            iterations=self.iterations,
        )
        semantic = output.semantic_logits.softmax(2)
        instance = semantic[:, :, :, None] * output.instance_logits.softmax(3)
        return {
            "semantic": semantic.unflatten(-1, output.grid),
            "instance": instance.unflatten(-1, output.grid),
            "scores": slot_similarity(output.semantic_slots, output.instance_slots),
        }


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written; `str()` is made for reading."""

    folder: Path
    differences: dict[str, dict[str, float]]
    """For each file and output the largest difference from the model."""
    examples: dict[str, list[str]]
    """For each file three lines that load and run it."""

    def __str__(self) -> str:
        lines = []
        for file, found in self.differences.items():
            size = (self.folder / file).stat().st_size / 1e6
            said = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
            lines.append(f"{self.folder / file}: {size:.1f} MB")
            lines.append(f"  largest differences from the model (≤ {TOLERANCE:g}): {said}")
            lines += ["  three lines run it:", *(f"    {line}" for line in self.examples[file])]
        return "\n".join(lines)


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    iterations: int | None = None,
    form: Format = "torch",
) -> Exported:
    """Write `model.pt2` and/or `model.onnx` and `config.json` to `folder`, once each file has been
    loaded again and compared with the model.

    Args:
        checkpoint: what `load_model` takes.
        height, width: of the frames; those of training when not given. The batch is free.
        iterations: of slot attention; the model's own when not given.

    Raises:
        UserError: for a checkpoint that is none, a size that is no multiple of the patch, a folder
            that cannot be written or holds something else, and missing ONNX packages.
        ParityError: when a file differs from the model by more than `TOLERANCE`; nothing is left.
    """
    forms = ("torch", "onnx") if form == "both" else (form,)
    if "onnx" in forms:
        _demand_onnx()
    # Plain torch alone: a file with operators of ours would need this package to be loaded.
    model = load_model(checkpoint, impl="eager").requires_grad_(False)
    shape = _shape(model, height, width, iterations)
    with whole_folder(folder, (*FILES.values(), "config.json"), writer="smtc export") as partial:
        program = _trace(Discovery(model, shape.iterations), shape.size)
        differences = {}
        for kind in forms:
            file = FILES[kind]
            _LOG.info("Writing and comparing %s.", file)
            {"torch": _write_torch, "onnx": _write_onnx}[kind](program, partial / file)
            run = {"torch": _load_torch, "onnx": _load_onnx}[kind](partial / file)
            differences[file] = _compare(run, model, shape, file)
        examples = {FILES[kind]: example(kind, folder, shape.size) for kind in forms}
        text = json.dumps(_describe(checkpoint, model, shape, differences), indent=2)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
    return Exported(folder=Path(folder), differences=differences, examples=examples)


def example(kind: str, folder: str | Path, size: tuple[int, int]) -> list[str]:
    """Three lines that load and run the file of `kind` in `folder`, outside this package too."""
    path, sizes = str(Path(folder) / FILES[kind]), f"1, {WINDOW}, 3, {size[0]}, {size[1]}"
    if kind == "torch":
        return [
            "import torch",
            f"model = torch.export.load({path!r}).module()",
            f"masks = model(torch.rand({sizes}))  # RGB in [0, 1]; a dict: {', '.join(OUTPUTS)}",
        ]
    return [
        "import numpy, onnxruntime",
        f"model = onnxruntime.InferenceSession({path!r})",
        f"{', '.join(OUTPUTS)} = "
        f'model.run(None, {{"clip": numpy.random.rand({sizes}).astype("float32")}})  # RGB, [0, 1]',
    ]


@dataclass(frozen=True)
class _Shape:
    """What is fixed in the file."""

    size: tuple[int, int]
    iterations: int


def _shape(model: SMTC, height: int | None, width: int | None, iterations: int | None) -> _Shape:
    """What is asked for, or the model's own. Raises `UserError` where the model cannot do it."""
    trained = model.config.resolution
    size = trained[0] if height is None else height, trained[1] if width is None else width
    patch = model.config.backbone.patch
    for name, side in zip(("height", "width"), size, strict=True):
        if side < patch or side % patch:
            raise UserError(
                f"--{name} {side} cannot be cut into this model's patches of {patch} pixels; "
                f"give a multiple of {patch}."
            )
    if iterations is None:
        iterations = model.config.iterations
    if iterations < 1:
        raise UserError(f"--iterations {iterations} is too few; give 1 or more.")
    return _Shape(size, iterations)


def _trace(module: Discovery, size: tuple[int, int]) -> ExportedProgram:
    module.eval()
    clip = torch.zeros(2, WINDOW, 3, *size)
    with torch.no_grad():
        program = torch.export.export(
            module, (clip,), dynamic_shapes={"clip": {0: Dim("batch")}}, strict=False
        )
    # Which lines of whose files made a node is nothing that the receiver of a file should learn.
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    program.example_inputs = None  # they would be saved along
    return program


def _write_torch(program: ExportedProgram, file: Path) -> None:
    torch.export.save(program, file)


def _load_torch(file: Path) -> Run:
    return torch.export.load(file).module()


def _demand_onnx() -> None:
    absent = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"ONNX needs {' and '.join(absent)}, which cannot be imported here; "
            f'pip install "smtc[onnx]", or use --format torch.'
        )


def _write_onnx(program: ExportedProgram, file: Path) -> None:
    with _quiet():
        # Unoptimised: onnxscript's optimiser takes the 1e-8 that keeps an empty mask from dividing
        # by zero for 0, and drops it. ONNX Runtime optimises when it loads.
        translated = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["clip"],
            output_names=list(OUTPUTS),
        )
    assert translated is not None
    translated.save(file, external_data=False)


def _load_onnx(file: Path) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; it has remarks on what it cannot fold
    providers = ["CPUExecutionProvider"]
    session = runtime.InferenceSession(str(file), options, providers=providers)

    def run(clip: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {"clip": clip.numpy()})
        return {name: torch.from_numpy(v) for name, v in zip(OUTPUTS, found, strict=True)}

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, on packages that play no part here and on each pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(run: Run, model: SMTC, shape: _Shape, file: str) -> dict[str, float]:
    """The largest difference of each output from what `smtc segment` makes masks of, over random
    clips. Raises `ParityError` where one is above `TOLERANCE` or no number.
    """
    # A position whose semantic mask lies on the threshold may be rounded to either side of it, and
    # its instances then differ; a file that is wrong is so for all clips.
    for seed in range(_DRAWS):
        largest = _differences(run, model, shape, seed)
        if all(value <= TOLERANCE for value in largest.values()):  # which NaN is not
            return largest
    worst = ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
    raise ParityError(
        f"{file} differs from the model by more than {TOLERANCE:g} ({worst}), so nothing was "
        "written; please report it with your versions of torch and onnxscript."
    )


def _differences(run: Run, model: SMTC, shape: _Shape, seed: int) -> dict[str, float]:
    settings = InferenceSettings(size=shape.size, iterations=shape.iterations)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS}
    for batch in _COMPARED:
        sizes = batch * WINDOW, *shape.size, 3
        frames = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator)
        wanted = predict(model, frames.numpy(), settings=settings, batch=batch)
        clip = frames.permute(0, 3, 1, 2).unflatten(0, (batch, WINDOW)) / 255
        for name, values in run(clip).items():
            found[name].append((values.flatten(0, 1) - getattr(wanted, name)).abs().amax())
    return {name: torch.stack(values).amax().item() for name, values in found.items()}


def _describe(
    checkpoint: str | Path,
    model: SMTC,
    shape: _Shape,
    differences: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What a user of the files needs to know, for `config.json`."""
    config = to_dict(model.config)
    config["backbone"]["weights"] = None
    height, width = shape.size
    rows, columns = (side // model.encoder.patch for side in (height, width))
    slots, instances = model.config.slots, model.config.instances
    packages = ("torch", *(_ONNX_PACKAGES if FILES["onnx"] in differences else ()))
    return {
        "format": 1,
        "kind": "export",
        "window": WINDOW,
        "size": [height, width],
        "iterations": shape.iterations,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "inputs": {
            "clip": {
                "dtype": "float32",
                "shape": ["batch", WINDOW, 3, height, width],
                "meaning": "Four consecutive frames, RGB in [0, 1], each squashed to this size. "
                "Mean and std are inside the file: do not normalise.",
            }
        },
        "outputs": {
            "semantic": {
                "shape": ["batch", WINDOW, slots, rows, columns],
                "meaning": "Soft masks of the semantic slots; they sum to 1.",
            },
            "instance": {
                "shape": ["batch", WINDOW, slots, instances, rows, columns],
                "meaning": "Soft masks of a semantic's instance slots; they sum to its own.",
            },
            "scores": {
                "shape": ["batch", WINDOW, slots, instances],
                "meaning": "Cosine of an instance slot and its semantic slot.",
            },
        },
        "model": config,
        "weights_sha256_16": checkpoint_hash(checkpoint),
        "largest_differences": differences,
        "examples": {
            file: example(kind, "", shape.size)
            for kind, file in FILES.items()
            if file in differences
        },
        "versions": {"smtc": __version__, **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)
