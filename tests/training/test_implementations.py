"""Training with the fused kernels: on a GPU where there is one, else in Triton's interpreter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import StoppedError, TinyConfig, interrupt, with_output

from smtc import load_model
from smtc.errors import UserError
from smtc.kernels import launching
from smtc.training.trainer import Run, train

DEVICE = "cpu" if launching.INTERPRETED else "cuda"

# Both phases of the losses: without the instances' and with it.
SETTINGS: dict[str, Any] = {
    "train__steps": 20,
    "train__batch": 1,
    "train__device": DEVICE,
    "objective__instance_from_step": 5,
}


@pytest.fixture(scope="module")
def trained(
    tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, list[launching.Launch]]]:
    """A function: implementation to the run of 20 steps, instance loss included, and its kernels'
    launches.
    """
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")

    def run(impl: str) -> tuple[Run, list[launching.Launch]]:
        folder = tmp_path_factory.mktemp(impl) / "run"
        settings = SETTINGS | {"model__impl": impl}
        with launching.watch() as launches:
            return train(with_output(tiny_config, folder, **settings)), launches

    return run


@pytest.fixture(scope="module")
def runs(trained: Any) -> dict[str, tuple[Run, list[launching.Launch]]]:
    return {impl: trained(impl) for impl in ("eager", "triton")}


def test_the_same_losses_for_twenty_steps(runs: Any) -> None:
    (eager, nothing), (triton, launches) = runs["eager"], runs["triton"]
    assert not nothing and launches
    for one, other in zip(triton.metrics, eager.metrics, strict=True):
        assert set(one) == set(other)
        for name in one:
            if name.startswith("loss") or "/" in name:
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), (name, one)


def test_every_operation_of_a_step_is_fused(runs: Any) -> None:
    names = {launch.name for launch in runs["triton"][1]}
    files = {launch.kernel.fn.__module__.rpartition(".")[2] for launch in runs["triton"][1]}
    assert files >= {
        "masked_slot_attention",
        "transport_passes",
        "mask_losses",
        "instance_consistency",
    }, names


def test_checkpoints_interchange(runs: Any) -> None:
    clip = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for run, _ in runs.values():
        assert load_model(run.folder).config.impl == "auto"
    model = load_model(runs["eager"][0].folder).to(DEVICE)
    other = load_model(runs["eager"][0].folder, impl="triton").to(DEVICE)
    with torch.no_grad():
        one, two = model(clip.to(DEVICE)), other(clip.to(DEVICE))
    torch.testing.assert_close(one.semantic_logits, two.semantic_logits, rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_with_the_other_implementation(
    runs: Any, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(impl: str) -> Run:
        settings = SETTINGS | {"model__impl": impl, "train__checkpoint_every": 17}
        return train(with_output(tiny_config, tmp_path / "run", **settings))

    with monkeypatch.context() as patch:
        interrupt(patch, 17)
        with pytest.raises(StoppedError):
            run("eager")
    last, expected = run("triton").metrics[-1], runs["eager"][0].metrics[-1]
    assert last["step"] == expected["step"] == 20
    assert last["loss"] == pytest.approx(expected["loss"], rel=2e-3)


def test_triton_without_a_gpu_is_one_sentence(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    config = with_output(tiny_config, tmp_path / "run", model__impl="triton")
    with pytest.raises(UserError, match=r"--model\.impl triton needs a CUDA device.*auto or eager"):
        train(config)
    assert not (tmp_path / "run").exists()
