"""The loop, seen through its seam by a toy method, and with SMTC and the warm start."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Line, TinyConfig, assert_same, moments, same, weights, with_output

from smtc import presets
from smtc.config import Config
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.pipelines.torch_loader import TorchLoader
from smtc.training.checkpoint import latest_checkpoint
from smtc.training.optim import learning_rate
from smtc.training.trainer import build_method, pick_device, train
from smtc.warm_start import WarmStart

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
    assert files == ["step_00000003", "step_00000005"]


def test_a_run_folder_holds_what_the_contract_says(tiny_run: Path) -> None:
    names = sorted(path.name for path in tiny_run.iterdir())
    files = ["config.json", "environment.json", "metrics.jsonl"]
    assert names == ["checkpoints", *files, "model", "tensorboard"]
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


def test_smtcs_teacher_follows_by_momentum(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(
        tiny_config, tmp_path / "run", train__steps=1, train__batch=4, teacher__momentum=0.75
    )
    method = SMTCMethod(config)
    start = weights(method.student, "")
    train(config, method=method)
    student, teacher = weights(method.student, ""), weights(method.teacher.model, "")
    assert not same(start, student)
    expected = {name: 0.75 * start[name] + 0.25 * student[name] for name in start}
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-7)


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
    with pytest.raises(UserError, match=r"gradient of step 2 was not finite .*step_00000002"):
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
    with pytest.raises(UserError, match="not finite"):
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


def test_the_loss_falls_on_one_batch(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Batch] = []

    def same_batch(loader: TorchLoader) -> Batch:
        first.append(draw(loader))
        return first[0]

    draw = TorchLoader.__next__
    monkeypatch.setattr(TorchLoader, "__next__", same_batch)
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
