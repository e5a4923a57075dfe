"""Two processes over gloo are one trainer; what many processes need does nothing in one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train_flags
from safetensors.torch import load_file
from stepping import clips, settings
from torch.nn.parallel import DistributedDataParallel

from smtc.method import SMTCMethod
from smtc.training import distributed
from smtc.training.checkpoint import latest_checkpoint
from smtc.training.distributed import Agreement, Heartbeat, World, joined
from smtc.training.step import Step
from smtc.training.telemetry import read_metrics

# Everything that is random, all three losses, and both changes of phase.
LIVELY = [
    *("--train.steps", "6", "--train.threads", "1", "--optim.lr", "1e-3"),
    *("--model.backbone.drop-path", "0.3", "--data.augment.flip", "0.5"),
    *("--objective.area", "0", "--objective.similarity", "-1"),
    *("--objective.instance-from-step", "2", "--optim.encoder-from-step", "4"),
]


def smtc(*arguments: object, ranks: int = 1, restarts: int = 0) -> list[str]:
    """The command line of `smtc` in one process, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = [*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    start = start if ranks > 1 else []
    return [sys.executable, *start, "-m", "smtc", *map(str, arguments)]


def run(command: list[str], code: int = 0, **environment: str) -> str:
    """What a command says on standard error; it has to end with `code`."""
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=settings, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def assert_close(first: Path, second: Path) -> None:
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    # Adam's first steps have the size of the rate whatever the gradient's, so its rounding shows.
    torch.testing.assert_close(one, other, rtol=0, atol=5e-4)


@pytest.fixture(scope="module")
def whole(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of four clips in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(smtc(*train_flags(synthetic_data, folder, *LIVELY, "--train.batch", 4)))
    return folder


def test_two_processes_are_one_with_twice_the_batch(
    whole: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    command = train_flags(synthetic_data, tmp_path / "run", *LIVELY, "--train.batch", 2)
    said = run(smtc(*command, ranks=2))
    assert said.count("tensors are trained from here") == 2  # the main process alone says it
    assert_close(whole, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 6 and all(row["skipped"] == 0 for row in rows)


def test_accumulated_batches_are_one_big_batch(
    whole: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    parts = ["--train.batch", 1, "--train.accumulate", 4]
    run(smtc(*train_flags(synthetic_data, tmp_path / "run", *LIVELY, *parts)))
    assert_close(whole, tmp_path / "run")


def test_both_together(whole: Path, synthetic_data: Path, tmp_path: Path) -> None:
    parts = ["--train.batch", 1, "--train.accumulate", 2]
    run(smtc(*train_flags(synthetic_data, tmp_path / "run", *LIVELY, *parts), ranks=2))
    assert_close(whole, tmp_path / "run")


TRACED = """
import functools, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # generates no code
from smtc import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("encoder", 1), pytest.param("model", 1, marks=pytest.mark.slow), ("encoder", 2)],
)
def test_two_processes_may_compile(
    whole: Path, synthetic_data: Path, tmp_path: Path, kind: str, parts: int
) -> None:
    """Over both changes of phase, each of which makes torch's wrapper anew."""
    file = tmp_path / "traced.py"
    file.write_text(TRACED, encoding="utf-8")
    more = ["--train.batch", 2 // parts, "--train.accumulate", parts, "--train.compile", kind]
    flags = [*LIVELY, *more, "--train.checkpoint-activations"]
    command = [str(flag) for flag in train_flags(synthetic_data, tmp_path / "run", *flags)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    said = run([*launcher, "--nproc-per-node=2", str(file), *command])
    assert f"The first steps compile the {kind}" in said
    assert "recompile_limit" not in said
    assert_close(whole, tmp_path / "run")


def kill_one_rank(launcher: subprocess.Popen[str], folder: Path, after: int) -> None:
    """SIGKILL to one of the launcher's processes once `after` steps are logged."""
    deadline = time.monotonic() + 60
    while len(read_metrics(folder / "metrics.jsonl")) < after:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_is_restarted_and_goes_on(synthetic_data: Path, tmp_path: Path) -> None:
    longer = [*LIVELY, "--train.steps", 40, "--train.checkpoint-every", 1]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(smtc(*train_flags(synthetic_data, straight, *longer), ranks=2))
    command = smtc(*train_flags(synthetic_data, killed, *longer), ranks=2, restarts=3)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        kill_one_rank(launcher, killed, after=5)
        said = launcher.communicate(timeout=180)[1]
    assert launcher.returncode == 0, said[-3000:]
    assert "Continuing" in said
    one, other = (load_file(f / "model" / "model.safetensors") for f in (straight, killed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_run_goes_on_with_more_processes_at_the_same_sample(
    synthetic_data: Path, tmp_path: Path
) -> None:
    """Asked to stop in step 3 of one process, then two processes: no clip missing, none twice."""
    script = (
        "import os, signal, sys\n"
        "from smtc import cli, method\n"
        "whole = method.SMTCMethod.training_step\n"
        "def step(self, batch, step):\n"
        "    with open(os.environ['SEEN'] + str(os.getpid()), 'a') as file:\n"
        "        print(*batch.index.tolist(), file=file)\n"
        "    if step == 2 and 'RANK' not in os.environ:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return whole(self, batch, step)\n"
        "method.SMTCMethod.training_step = step\n"
        "cli.main(sys.argv[1:])\n"
    )
    file = tmp_path / "watched.py"
    file.write_text(script, encoding="utf-8")
    flags = [str(flag) for flag in train_flags(synthetic_data, tmp_path / "run", *LIVELY)]
    seen = {"SEEN": str(tmp_path / "seen")}
    run([sys.executable, str(file), *flags], code=143, **seen)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run([*launcher, "--nproc-per-node=2", str(file), *flags], **seen)
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.glob("seen*")]
    drawn = sorted(int(number) for text in texts for number in text.split())
    assert drawn == list(range(3 * 2 + 3 * 4))
    state = latest_checkpoint(tmp_path / "run")
    assert state is not None and (state["step"], state["sample"]) == (6, 18)


def test_a_mistake_under_torchrun_is_a_sentence(synthetic_data: Path, tmp_path: Path) -> None:
    command = train_flags(synthetic_data, tmp_path / "run", "--model.impl", "triton")
    said = run(smtc(*command, ranks=2), code=1, TRITON_INTERPRET="0")
    assert "smtc: --model.impl triton" in said
    assert not (tmp_path / "run").exists()


# One process.


def test_alone_everything_is_itself() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.mean(values), torch.tensor([1.0, 2.0]))
    assert distributed.gather("x") == ["x"]
    distributed.wait_for_all()
    distributed.check_same_start(torch.nn.Linear(2, 2))
    agreement, heartbeat = Agreement(), Heartbeat(World(torch.device("cpu")))
    assert [agreement.ask(said) for said in (False, True, False)] == [False, True, False]
    heartbeat.beat(3)
    assert heartbeat.laggards() == {}
    heartbeat.close()


def test_one_process_of_torchrun_joins_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined(torch.device("cpu")) as world:
        assert world == World(torch.device("cpu")) and world.main
    assert not torch.distributed.is_initialized()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with joined(torch.device("cpu")) as world:
        assert torch.distributed.is_initialized()
        assert (world.rank, world.size) == (0, 1)
    assert not torch.distributed.is_initialized()


def test_every_step_sends_all_gradients_but_parts_of_one_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with joined(torch.device("cpu")):
        for parts, static in ((1, True), (2, False)):
            config = settings(train__accumulate=parts)
            stepper = Step(SMTCMethod(config).train(), config, World(torch.device("cpu"), size=2))
            for step in range(3):
                assert not stepper(clips(config, step), step).skipped
                assert isinstance(stepper.forward, DistributedDataParallel)
                assert stepper.forward.static_graph == static


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TWO = """
import json, logging, sys, time, torch
from smtc.training import distributed
from smtc.training.distributed import Agreement, Heartbeat, joined
logging.basicConfig(level=logging.INFO, format="%(message)s")
distributed._LAGGING_AFTER = 0.5
with joined(torch.device("cpu")) as world:
    told = {"mean": distributed.mean(torch.tensor([float(world.rank)])).item()}
    told["gathered"] = distributed.gather(world.rank)
    agreement = Agreement()
    told["agreed"] = [agreement.ask(world.rank == 1 and call == 1) for call in range(4)]
    agreement.close()
    torch.manual_seed(world.rank)
    try:
        distributed.check_same_start(torch.nn.Linear(2, 2))
    except ValueError as error:
        told["refused"] = str(error)
    heartbeat = Heartbeat(world)
    heartbeat.beat(7 - 4 * world.rank)
    distributed.wait_for_all()
    told["laggards"] = heartbeat.laggards()
    time.sleep(2)
    logging.getLogger("smtc").info("info of rank %d", world.rank)
    heartbeat.close()
    sys.stderr.write(json.dumps(told) + "\\n")  # at once: both write to one place
"""


def test_what_two_processes_tell_each_other(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(TWO, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    said = run([*launcher, "--nproc-per-node=2", str(file)])
    told: list[dict[str, Any]] = [json.loads(x) for x in said.splitlines() if x.startswith("{")]
    assert len(told) == 2
    for one in told:
        assert (one["mean"], one["gathered"]) == (0.5, [0, 1])
        assert one["agreed"] == [False, False, True, True]
        assert "different weights" in one["refused"]
        assert one["laggards"] == {"1": 3}
    assert "Waiting for rank 1 at step 3; the others are further." in said
    assert "info of rank 0" in said and "info of rank 1" not in said
