"""The loop, seen through its seam by a toy method, and with SMTC and the warm start."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smtc import presets
from smtc.config import Config
from smtc.errors import UserError
from smtc.method import Method, SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.pipelines.torch_loader import TorchLoader
from smtc.training import trainer
from smtc.training.checkpoint import latest_checkpoint
from smtc.training.optim import learning_rate
from smtc.training.trainer import Run, Trainer, build_method, pick_device, train
from smtc.warm_start import WarmStart

TinyConfig = Callable[..., Config]

CLOCKED = ("clips_per_s", "data_wait_share")


class Line(Method):
    """Two linear layers on a clip's mean colour, and a slow copy of the second."""

    def __init__(self, encoder_from: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)
        self.slow = nn.Linear(4, 1).requires_grad_(False)
        self.encoder_from = encoder_from
        self.seen: list[list[int]] = []
        self.followed: list[int] = []

    def trainable(self, step: int) -> dict[str, nn.Parameter]:
        learns = ("encoder.", "head.") if step >= self.encoder_from else ("head.",)
        return {n: p for n, p in self.named_parameters() if n.startswith(learns)}

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.seen.append(batch.index.tolist())
        said = self.head(self.encoder(batch.views.mean(dim=(1, 2, 4, 5))))
        return {"loss": (said - 1).square().mean(), "said": said.mean()}

    def after_step(self, step: int) -> None:
        self.followed.append(step)
        with torch.no_grad():
            self.slow.weight.lerp_(self.head.weight, 0.5)

    def save_model(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.state_dict(), folder / "line.pt")


class StoppedError(Exception):
    """Stands for a killed program."""


def with_output(tiny_config: TinyConfig, folder: Path, **settings: Any) -> Config:
    """The tiny config with `train__steps=3` for train.steps = 3."""
    preset = settings.pop("preset", "tiny")
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return tiny_config({"output": str(folder)} | dotted, preset=preset)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let training die when `after` steps are done."""
    whole = Trainer._step

    def step(self: Trainer, batch: Batch) -> dict[str, Tensor]:
        if self.step == after:
            raise StoppedError
        return whole(self, batch)

    monkeypatch.setattr(Trainer, "_step", step)


def logged(run: Run) -> list[dict[str, Any]]:
    """The metrics but for what a clock says."""
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in run.metrics]


def moments(run: Run) -> dict[str, dict[str, Tensor]]:
    state = latest_checkpoint(run.folder)
    assert state is not None
    return state["optimizer"]


def assert_same(first: Run, second: Run) -> None:
    """Both runs ended with the same bits."""
    torch.testing.assert_close(
        first.method.state_dict(), second.method.state_dict(), rtol=0, atol=0
    )
    torch.testing.assert_close(moments(first), moments(second), rtol=0, atol=0)
    assert logged(first) == logged(second)


def weights(method: nn.Module, part: str) -> dict[str, Tensor]:
    found = {n: v.clone() for n, v in method.state_dict().items() if n.startswith(part)}
    assert found
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


# The seam.


def test_any_method_trains(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(
        tiny_config, tmp_path / "run", train__steps=40, optim__lr=0.05, optim__encoder_from_step=0
    )
    run = train(config, method=Line())
    losses = [line["loss"] for line in run.metrics]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert isinstance(run.method, Line)
    assert run.folder == tmp_path / "run"
    assert run.model_folder == tmp_path / "run" / "model"
    saved = torch.load(run.model_folder / "line.pt")
    torch.testing.assert_close(saved, run.method.state_dict(), rtol=0, atol=0)


def test_exactly_the_configured_steps(tiny_config: TinyConfig, tmp_path: Path) -> None:
    method = Line()
    run = train(with_output(tiny_config, tmp_path / "run", train__steps=5), method=method)
    assert method.seen == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert method.followed == [0, 1, 2, 3, 4]
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5]
    assert {float(state["step"]) for state in moments(run).values()} == {5.0}


def test_the_last_step_is_logged_and_saved_whatever_the_rhythm(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_output(
        tiny_config,
        tmp_path / "run",
        train__steps=5,
        train__log_every=2,
        train__checkpoint_every=3,
    )
    run = train(config, method=Line())
    assert [line["step"] for line in run.metrics] == [2, 4, 5]
    files = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert files == ["step_00000003.pt", "step_00000005.pt"]


def test_a_run_folder_holds_what_the_contract_says(tiny_run: Path) -> None:
    names = sorted(path.name for path in tiny_run.iterdir())
    assert names == ["checkpoints", "config.json", "metrics.jsonl", "model", "tensorboard"]
    model = sorted(path.name for path in (tiny_run / "model").iterdir())
    assert model == ["config.json", "model.safetensors"]
    lines = (tiny_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    parts = {"loss", "alignment", "regularisation", "instance", "lr", "replaced_clips"}
    assert parts <= json.loads(lines[0]).keys()


def test_the_learning_rate_that_is_logged_is_the_heads(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=2)
    run = train(config, method=Line(encoder_from=2))
    expected = [learning_rate(step, 4, config.optim) for step in range(4)]
    assert [line["lr"] for line in run.metrics] == pytest.approx(expected)


def test_gradients_are_clipped_and_their_norm_logged(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    whole = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        return whole(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = with_output(tiny_config, tmp_path / "run", optim__clip_norm=1e-3)
    run = train(config, method=Line())
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)
    assert all(line["gradient_norm"] > 1e-2 for line in run.metrics)


def test_the_seed_decides_the_result(tiny_config: TinyConfig, tmp_path: Path) -> None:
    first, again, other = (
        train(with_output(tiny_config, tmp_path / name, train__seed=seed, train__steps=1))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert_same(first, again)
    assert not same(weights(first.method, "student."), weights(other.method, "student."))


def test_no_data_named(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run", data__root=None)
    with pytest.raises(UserError, match="--data"):
        train(config, method=Line())
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="CUDA was asked for"):
        pick_device("cuda")


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")


def test_the_config_names_the_method(tiny_config: TinyConfig) -> None:
    assert isinstance(build_method(tiny_config()), SMTCMethod)
    assert isinstance(build_method(tiny_config(preset="tiny_encoder")), WarmStart)


# Stopping and starting again.

STRAIGHT = {"train__steps": 5, "train__checkpoint_every": 1, "optim__encoder_from_step": 3}


@pytest.fixture(scope="module")
def straight(
    tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """A function: preset to a run of five steps without a stop; SMTC's encoder unfreezes at 3."""
    runs: dict[str, Run] = {}

    def run(preset: str) -> Run:
        if preset not in runs:
            folder = tmp_path_factory.mktemp("straight") / preset
            runs[preset] = train(with_output(tiny_config, folder, **settings(preset)))
        return runs[preset]

    return run


def settings(preset: str) -> dict[str, Any]:
    """SMTC with all that is random: stochastic depth, references, flips, live instances."""
    if preset == "tiny_encoder":
        return {"preset": preset, "train__steps": 5, "train__checkpoint_every": 1}
    live = {"objective__instance_from_step": 0, "objective__area": 0.0, "objective__similarity": -1}
    return STRAIGHT | live | {"model__backbone__drop_path": 0.5, "data__augment__flip": 0.5}


@pytest.mark.parametrize(
    ("preset", "stop", "workers"),
    [
        ("tiny", 2, 0),
        ("tiny", 3, 0),
        ("tiny", 4, 0),
        ("tiny", 3, 1),
        ("tiny_encoder", 2, 0),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    straight: Callable[[str], Run],
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    stop: int,
    workers: int,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, stop)
        train(with_output(tiny_config, tmp_path / "run", **settings(preset)))
    state = latest_checkpoint(tmp_path / "run")
    assert state is not None and state["step"] == stop
    torch.manual_seed(987)
    again = {"data__workers": workers}
    resumed = train(with_output(tiny_config, tmp_path / "run", **settings(preset), **again))
    assert_same(straight(preset), resumed)


def test_the_teacher_resumes_too(straight: Callable[[str], Run]) -> None:
    """So that the comparison above is known to hold a teacher that has moved by itself."""
    method = straight("tiny").method
    student, teacher = weights(method, "student."), weights(method, "teacher.model.")
    renamed = {name.replace("teacher.model.", "student."): v for name, v in teacher.items()}
    assert renamed.keys() == student.keys()
    assert not same(student, renamed)


def test_steps_after_the_last_checkpoint_are_done_again(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rhythm = {"train__steps": 6, "train__checkpoint_every": 2}
    expected = train(with_output(tiny_config, tmp_path / "straight", **rhythm), method=Line())
    config = with_output(tiny_config, tmp_path / "run", **rhythm)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, 3)
        train(config, method=Line())
    method = Line()
    assert_same(expected, train(config, method=method))
    assert method.seen[0] == [4, 5]


def test_a_finished_run_started_again_does_nothing(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run")
    first = train(config)
    weights_file = first.model_folder / "model.safetensors"
    before = weights_file.read_bytes()
    again = train(config)
    assert_same(first, again)
    assert weights_file.read_bytes() == before
    assert len(again.metrics) == 4


def test_no_steps_write_the_initial_model(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run", train__steps=0)
    method = Line()
    before = weights(method, "")
    run = train(config, method=method)
    assert (method.seen, run.metrics) == ([], [])
    assert same(before, torch.load(run.model_folder / "line.pt"))
    train(config, method=Line())


# Phases.


def record(monkeypatch: pytest.MonkeyPatch, part: str) -> list[dict[str, Tensor]]:
    """Fills with the weights under `part` as they are after each step."""
    seen: list[dict[str, Tensor]] = []
    whole = Trainer._step

    def step(self: Trainer, batch: Batch) -> dict[str, Tensor]:
        scalars = whole(self, batch)
        seen.append(weights(self.method, part))
        return scalars

    monkeypatch.setattr(Trainer, "_step", step)
    return seen


def test_the_frozen_encoder_moves_only_from_its_step(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = record(monkeypatch, "student.encoder.")
    config = with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=2)
    method = SMTCMethod(config)
    start = weights(method, "student.encoder.")
    train(config, method=method)
    assert same(start, seen[0]) and same(start, seen[1])
    assert not same(start, seen[2]) and not same(seen[2], seen[3])


def test_a_phase_change_is_told_once_and_marks_what_is_trained(
    tiny_config: TinyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_output(tiny_config, tmp_path / "run")
    method = Line(encoder_from=2)
    with caplog.at_level(logging.INFO, logger="smtc"):
        train(config, method=method)
    assert [r.message for r in caplog.records] == ["Step 2: 4 tensors are trained from here."]
    marked = {name for name, p in method.named_parameters() if p.requires_grad}
    assert marked == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}


def test_what_is_frozen_gets_no_gradient(tiny_config: TinyConfig, tmp_path: Path) -> None:
    method = Line(encoder_from=99)
    train(with_output(tiny_config, tmp_path / "run"), method=method)
    assert method.encoder.weight.grad is None
    assert not method.encoder.weight.requires_grad
    assert method.head.weight.grad is not None


def test_a_phase_change_keeps_the_heads_moments(tiny_config: TinyConfig, tmp_path: Path) -> None:
    run = train(with_output(tiny_config, tmp_path / "run"), method=Line(encoder_from=3))
    counts = {name: float(state["step"]) for name, state in moments(run).items()}
    assert counts == {
        "encoder.weight": 1.0,
        "encoder.bias": 1.0,
        "head.weight": 4.0,
        "head.bias": 4.0,
    }


def test_a_frozen_backward_warms_moments_and_moves_nothing(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_output(
        tiny_config,
        tmp_path / "run",
        optim__encoder_from_step=3,
        optim__frozen_backward=True,
        train__steps=3,
    )
    method = SMTCMethod(config)
    start = weights(method, "student.encoder.")
    run = train(config, method=method)
    assert same(start, weights(method, "student.encoder."))
    warmed = {n: s for n, s in moments(run).items() if n.startswith("encoder.")}
    assert warmed.keys() == {n for n in method.trainable(0) if n.startswith("encoder.")}
    assert all(float(state["step"]) == 3.0 for state in warmed.values())
    assert all(state["exp_avg_sq"].sum() > 0 for state in warmed.values())


def test_a_frozen_phase_leaves_no_moments_of_the_encoder(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    run = train(with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=-1))
    assert moments(run)
    assert not any(name.startswith("encoder.") for name in moments(run))


# Numbers.


def everything_counts(tiny_config: TinyConfig, folder: Path, **settings: Any) -> Config:
    """Nothing is left without a gradient: the encoder trained, all slots valid, and so few of them
    that some mask exceeds one half.
    """
    return with_output(
        tiny_config,
        folder,
        model__slots=2,
        optim__encoder_from_step=0,
        objective__instance_from_step=0,
        objective__area=0.0,
        objective__similarity=-1.0,
        **settings,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient", ["straight_through", "full"])
def test_all_trained_parameters_get_gradients(
    tiny_config: TinyConfig, tmp_path: Path, precision: str, gradient: str
) -> None:
    config = everything_counts(
        tiny_config,
        tmp_path / "run",
        train__steps=1,
        train__precision=precision,
        model__gradient=gradient,
    )
    run = train(config)
    for name, parameter in run.method.trainable(0).items():
        assert parameter.grad is not None, name
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_bf16_says_nearly_what_fp32_says(tiny_config: TinyConfig, tmp_path: Path) -> None:
    losses = {
        precision: train(
            everything_counts(
                tiny_config, tmp_path / precision, train__steps=1, train__precision=precision
            )
        ).metrics[0]["loss"]
        for precision in ("fp32", "bf16")
    }
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


class Diverging(Line):
    """Its loss is no number from step 3 (counted from 1) on."""

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        scalars = super().training_step(batch, step)
        return scalars | {"loss": scalars["loss"] * (float("nan") if step >= 2 else 1.0)}


def test_a_loss_that_is_no_number_stops(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run", train__steps=9, train__checkpoint_every=1)
    method = Diverging()
    with pytest.raises(UserError, match=r"no finite number by step 3; .*checkpoints"):
        train(config, method=method)
    assert len(method.seen) == 3
    assert not (tmp_path / "run" / "model").exists()


def test_no_checkpoint_holds_weights_that_are_no_numbers(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_output(
        tiny_config,
        tmp_path / "run",
        train__steps=9,
        train__checkpoint_every=1,
        train__log_every=5,
    )
    with pytest.raises(UserError, match="no finite number"):
        train(config, method=Diverging())
    state = latest_checkpoint(tmp_path / "run")
    assert state is None or state["method"]["head.weight"].isfinite().all()


def test_the_metrics_stay_json_when_the_loss_is_no_number(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    with pytest.raises(UserError):
        train(with_output(tiny_config, tmp_path / "run", train__steps=9), method=Diverging())
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        json.loads(line, parse_constant=refuse)


class SameBatch(TorchLoader):
    """The first batch again and again."""

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.first = getattr(self, "first", batch)
        return self.first


def test_the_loss_falls_on_one_batch(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "TorchLoader", SameBatch)
    config = everything_counts(tiny_config, tmp_path / "run", train__steps=30, optim__lr=2e-3)
    losses = [line["loss"] for line in train(config).metrics]
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def test_views_with_their_own_crops_train(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = everything_counts(
        tiny_config,
        tmp_path / "run",
        train__steps=2,
        data__spatial="independent",
        data__augment__crop=(0.4, 0.8),
        data__augment__flip=0.5,
    )
    run = train(config)
    assert len(run.metrics) == 2
    assert all(line["alignment"] > 0 for line in run.metrics)
    assert all(p.grad is not None for p in run.method.trainable(1).values())


# Every preset.


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_trains_two_steps(preset: str, synthetic_data: Path, tmp_path: Path) -> None:
    config = presets.get(preset)
    short = replace(config.train, batch=2, steps=2, device="cpu", log_every=1)
    data = replace(config.data, root=str(synthetic_data), workers=0)
    run = train(replace(config, train=short, data=data, output=str(tmp_path / "run")))
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert all(line["loss"] != 0 for line in run.metrics)
    assert (run.model_folder / "model.safetensors").stat().st_size > 0
    shutil.rmtree(run.folder)  # half a gigabyte
