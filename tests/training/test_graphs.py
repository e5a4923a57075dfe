"""A recorded step replays what an ordinary one computes; here with a stand-in for CUDA's graphs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recording import Recording, Streams, WaitsError, stand_in
from stepping import CPU, Trace, assert_alike, built, clips, go_on, settings, stepped
from torch import Tensor
from toy import same

from smtc.config import Config
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training import graphs
from smtc.training.graphs import Graphed
from smtc.training.step import Step

# Frozen and without instances; then with them; then with the encoder, which also joins.
PHASES: dict[str, Any] = {
    "train__cuda_graphs": "on",
    "objective__instance_from_step": 5,
    "optim__encoder_from_step": 10,
    "optim__warmup_steps": 3,
    "teacher__momentum": 0.8,
}
STEPS = 15


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[Streams, list[Recording]]:
    return stand_in(monkeypatch)


def ordinary(config: Config, steps: int = STEPS) -> Trace:
    """The same without a recording: every step is one of those that come before it."""
    trace = built(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "WARM_UP", 10**9)
        return go_on(trace, range(steps))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train__accumulate": 2, "train__checkpoint_activations": True},
        {"train__precision": "bf16", "data__spatial": "independent"},
        {"objective__form": "l2_margin", "model__gradient": "full", "model__update": "gru"},
        {"optim__clip_norm": None, "teacher__scope": "head", "model__sampling": "detached"},
        # The instance loss begins, and no other parameter learns from it.
        {
            "objective__form": "l2_margin",
            "model__gradient": "full",
            "model__embedding": "raw",
            "model__sampling": "detached",
        },
    ],
    ids=["tiny", "accumulated", "bf16", "paper", "released", "raw"],
)
def test_replayed_steps_are_ordinary_ones(
    recorded: tuple[Streams, list[Recording]], more: dict[str, Any]
) -> None:
    """Bit for bit, over two changes of what a step computes, at a rate that changes each step."""
    config = settings(**PHASES, **more)
    trace = stepped(config, STEPS)
    assert len(recorded[1]) == 3  # each phase was recorded, after three steps of its own
    assert_alike(trace, ordinary(config))


def test_without_graphs_it_is_the_same_within_rounding(
    recorded: tuple[Streams, list[Recording]],
) -> None:
    """There the rates are the host's numbers, in double precision."""
    replayed, plain = (
        stepped(settings(**PHASES), 8),
        stepped(settings(**PHASES | {"train__cuda_graphs": "off"}), 8),
    )
    for one, other in zip(replayed.scalars, plain.scalars, strict=True):
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-4, atol=1e-5)


def test_recording_changes_nothing_and_a_replay_does(
    recorded: tuple[Streams, list[Recording]],
) -> None:
    trace = go_on(built(settings(**PHASES)), range(3))
    before = trace.weights
    assert not recorded[1]
    recording = graphs.record

    def looked_at(*arguments: Any) -> Any:
        replay = recording(*arguments)
        torch.testing.assert_close(trace.weights, before, rtol=0, atol=0)
        return replay

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "record", looked_at)
        go_on(trace, range(3, 4))
    assert not same(trace.weights, before)


def test_what_a_step_hands_out_is_its_own(recorded: tuple[Streams, list[Recording]]) -> None:
    trace = built(settings(**PHASES))
    stepper, handed = trace.stepper, []
    for step in range(5):
        done = stepper(clips(stepper.config, step), step)
        handed.append((done, {n: v.clone() for n, v in done.scalars.items()}, done.skipped.clone()))
    assert len(recorded[1]) == 1
    for done, scalars, skipped in handed:
        torch.testing.assert_close(done.scalars, scalars, rtol=0, atol=0)
        assert torch.equal(done.skipped, skipped) and not skipped
    assert len({float(done.scalars["loss"]) for done, *_ in handed}) == 5
    assert handed[-1][0].scalars.keys() == handed[0][0].scalars.keys()


def test_loaders_may_write_over_their_batch(recorded: tuple[Streams, list[Recording]]) -> None:
    """As DALI's does on a GPU: one and the same tensor each time, also within a step."""
    config = settings(**PHASES, train__accumulate=2)
    expected = stepped(config, 5)

    class Reusing:
        def __init__(self) -> None:
            self.held: Batch | None = None

        def batches(self, step: int) -> Iterator[Batch]:
            for batch in clips(config, step):
                if self.held is None:
                    self.held = batch
                self.held.views.copy_(batch.views)
                yield Batch(self.held.views, [], batch.index)

    trace, loader = built(config), Reusing()
    for step in range(5):
        done = trace.stepper(loader.batches(step), step)
        torch.testing.assert_close(done.scalars, expected.scalars[step], rtol=0, atol=0)


def test_a_skipped_step_replays_too(recorded: tuple[Streams, list[Recording]]) -> None:
    config = settings(**PHASES)
    trace = go_on(built(config), range(4))
    weights, moments = (
        trace.weights,
        {name: {k: v.clone() for k, v in state.items()} for name, state in trace.moments.items()},
    )
    (batch,) = clips(config, 4)
    batch.views[0, 0] = float("nan")
    done = trace.stepper(iter([batch]), 4)
    assert done.skipped
    torch.testing.assert_close(trace.weights, weights, rtol=0, atol=0)
    torch.testing.assert_close(trace.moments, moments, rtol=0, atol=0)
    done = trace.stepper(clips(config, 4), 4)
    assert not done.skipped and len(recorded[1]) == 1


def test_a_run_goes_on_where_it_stopped(recorded: tuple[Streams, list[Recording]]) -> None:
    config = settings(**PHASES)
    straight, first = stepped(config, 9), stepped(config, 6)
    torch.manual_seed(5)
    again = built(config)
    again.method.load_state_dict(first.weights)
    again.stepper.load_state_dict(first.stepper.state_dict(), 6)
    go_on(again, range(6, 9))
    straight.scalars, straight.gradients = straight.scalars[6:], straight.gradients[6:]
    assert_alike(again, straight)


def test_a_step_that_already_recorded_takes_over_another_state(
    recorded: tuple[Streams, list[Recording]],
) -> None:
    """The recording would go on with the moments that it had."""
    config = settings(**PHASES)
    expected = stepped(config, 5)
    once = stepped(config, 2)
    state = once.stepper.state_dict()
    kept = {n: {k: v.clone() for k, v in m.items()} for n, m in state["optimizer"].items()}
    weights = once.weights
    trace = go_on(once, range(2, 5))
    assert recorded[1]
    trace.method.load_state_dict(weights)
    trace.stepper.load_state_dict({"optimizer": kept}, 2)
    trace.scalars, trace.gradients = trace.scalars[:2], trace.gradients[:2]
    assert_alike(go_on(trace, range(2, 5)), expected)


def test_streams_wait_for_each_other(recorded: tuple[Streams, list[Recording]]) -> None:
    streams = recorded[0]
    trace = built(settings(**PHASES))
    seen: list[tuple[str, ...]] = []
    whole = trace.stepper._compute

    def noting(*arguments: Any) -> dict[str, Tensor]:
        streams.events.append(f"compute on {streams.current}")
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace.stepper, "_compute", noting)
        for step in range(5):
            streams.events.clear()
            go_on(trace, range(step, step + 1))
            seen.append(tuple(streams.events))
    ordinary = ("side waits for main", "compute on side", "main waits for side")
    assert seen == [ordinary] * 3 + [("compute on side", "replay on main"), ("replay on main",)]


def test_many_processes_warm_up_for_longer(recorded: tuple[Streams, list[Recording]]) -> None:
    """torch's gradients of many processes settle within ten steps."""
    side = torch.cuda.Stream()
    for parallel, expected in ((False, 4), (True, 12)):
        calls: list[int] = []
        graphed = Graphed(
            lambda batches: {"loss": sum((b.views.sum() for b in batches), torch.zeros(()))},
            *(2, side),
            parallel=parallel,
        )
        config = settings(train__accumulate=2)
        for step in range(14):
            before = len(recorded[1])
            found = graphed(clips(config, step))
            total = sum(float(batch.views.sum()) for batch in clips(config, step))
            assert float(found["loss"]) == pytest.approx(total, rel=1e-3, abs=1e-2)
            calls += [step + 1] * (len(recorded[1]) - before)
        assert calls == [expected]


def test_what_makes_the_host_wait_cannot_be_recorded(
    recorded: tuple[Streams, list[Recording]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SMTCMethod.training_step
    for fault in (lambda loss: loss.item(), lambda loss: torch.tensor(1.0, device=loss.device)):

        def waiting(self: SMTCMethod, *arguments: Any, fault: Any = fault) -> dict[str, Tensor]:
            found = whole(self, *arguments)
            return found | {"loss": found["loss"] + 0 * fault(found["loss"])}

        with monkeypatch.context() as patch:
            patch.setattr(SMTCMethod, "training_step", waiting)
            trace = go_on(built(settings(**PHASES)), range(3))
            with pytest.raises(WaitsError, match="not permitted"):
                go_on(trace, range(3, 4))


def test_rates_are_tensors_of_their_own(recorded: tuple[Streams, list[Recording]]) -> None:
    config = settings(**PHASES, optim__encoder_lr=0.5)
    trace = built(config)
    trace.stepper.enter(10)
    trace.stepper(clips(config, 10), 10)
    rates = {group["encoder"]: group["lr"] for group in trace.stepper.optimizer.param_groups}
    assert all(isinstance(rate, Tensor) for rate in rates.values())
    torch.testing.assert_close(rates[True], 0.5 * rates[False])
    places = [group["lr"].data_ptr() for group in trace.stepper.optimizer.param_groups]
    assert len(set(places)) == len(places)


def test_a_real_recording_is_asked_for_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the given stream, and so that other threads may go on using CUDA."""
    asked: dict[str, Any] = {}

    class Graph:
        def replay(self) -> None:
            asked["replayed"] = asked.get("replayed", 0) + 1

    class Recorder:
        def __init__(self, graph: Graph, **options: Any) -> None:
            asked.update(options, graph=graph)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    kept = torch.ones(3)
    side: Any = object()
    replay = graphs.record(lambda: kept, side)
    assert asked["stream"] is side and asked["capture_error_mode"] == "thread_local"
    assert "replayed" not in asked
    assert replay() is kept and asked["replayed"] == 1


def test_off_uses_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: pytest.fail("a stream was made"))
    trace = stepped(settings(), 1)
    assert isinstance(trace.stepper, Step) and trace.stepper.world.device == CPU
