"""How fast is a whole training step? Every provider of `step_providers.py` on the same clips.

The clips lie on the device already; `smtc bench data` is about what comes before. A provider whose
first losses are not those of the literal step is not timed. All are timed in turn, a step of each a
round, so that drift of the machine meets all alike and ratios are those of single rounds.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smtc import presets
from smtc.benchmarks.blocks import markdown
from smtc.benchmarks.harness import (
    Report,
    dense_bf16_rate,
    interleaved_times,
    peak_memory,
    pick_device,
    timing,
)
from smtc.benchmarks.quiet import untrained_allowed
from smtc.benchmarks.step_ablations import ABLATIONS, Ablation
from smtc.benchmarks.step_measures import (
    distance,
    first_losses,
    in_short,
    part_times,
    step_flops,
    syncs,
)
from smtc.benchmarks.step_providers import PROVIDERS, Case, Provider, Running, pick_providers
from smtc.benchmarks.step_tables import step_blocks
from smtc.errors import UserError
from smtc.pipelines.batch import Batch
from smtc.progress import track

Row = dict[str, Any]
FARTHEST = {"fp32": 1e-4, "bf16": 1e-2}
"""How far a loss of the first two steps may be from the literal step's, relative to it."""
CPU_CLIPS, GPU_CLIPS = 2, 32
PHASE_REPEATS = 3
WARM_UP = {"cpu": 1, "cuda": 5}
"""Steps before the timed ones: a graph is recorded after some."""


def run(
    output: Path,
    *,
    preset: str = "fixed",
    sizes: Sequence[int] = (256,),
    clips: Sequence[int] = (),
    providers: Sequence[str] = (),
    ablation: bool = False,
    seconds: float = 10.0,
    device: str = "auto",
    deadline: float | None = None,
) -> int:
    """Time, print tables and write `output`/step.json.

    Args:
        output: the folder.
        preset: whose settings a step has, but that its encoder learns and all losses count.
        sizes: positions L.
        clips: clips a batch; without any 32, on a CPU 2.
        providers: names of `PROVIDERS`; all that can run where none is named.
        ablation: also what single changes are worth.
        seconds: about how long to repeat each provider's step; at least five times.
        device: "cuda", "cpu" or "auto".
        deadline: a time of `time.monotonic` after which nothing is begun; ablations come last.

    Returns:
        an exit code: 1 where a wrong result was refused.
    """
    device = pick_device(device)
    chosen = pick_providers(tuple(providers), device)
    if presets.get(preset).method != "smtc":
        raise UserError(f"--preset {preset} trains no SMTC; bench step takes the others.")
    numbers = tuple(clips) or ((GPU_CLIPS if device == "cuda" else CPU_CLIPS),)
    if not sizes or min(numbers) < 1 or not 0 < seconds < math.inf:
        raise UserError("--clips are numbers of at least 1, and --seconds is a positive number.")
    cases = [Case(preset, positions, number) for positions in sizes for number in numbers]
    for case in cases:
        case.config()  # a size that is none is told before anything is timed
    bench = _Bench(Report(output / "step.json"), device, seconds)
    jobs: list[tuple[Case, Ablation | None]] = [(case, None) for case in cases]
    jobs += [(case, group) for case in cases for group in ABLATIONS if ablation]
    with untrained_allowed():
        for number, (case, group) in enumerate(track(jobs, title=f"steps on {device}", unit="job")):
            if deadline is not None and time.monotonic() > deadline:
                print(f"Out of time: {len(jobs) - number} of {len(jobs)} jobs left.")
                break
            if group is None:
                bench.case(case, chosen)
            else:
                bench.ablation(case, group)
    print(markdown(step_blocks(bench.report.rows)))
    print(f"{len(bench.report.rows)} rows in {bench.report.path}")
    return 1 if bench.wrong else 0


class _Bench:
    """Runs cases into a report."""

    def __init__(self, report: Report, device: str, seconds: float) -> None:
        self.report, self.device, self.seconds = report, device, seconds
        self.wrong = False

    def case(self, case: Case, providers: Sequence[Provider]) -> None:
        """Every provider's time, memory, arithmetic and phases."""
        batch = case.batch(self.device)
        labels = self._labels(case) | {"kind": "provider"}
        chosen = {p.name: p for p in providers}
        rows: dict[str, Row] = {name: labels | {"provider": name} for name in chosen}
        running = self._checked(case, chosen, batch, rows)
        flops = step_flops(case) if running else 0.0
        done: list[str] = []
        for group in _groups(chosen, running):
            times = self._timed({name: running[name] for name in group}, batch, rows)
            for name in [name for name in times if name not in done]:
                done.append(name)
                row = rows[name] | {"flops": flops}
                try:
                    self._conclude(case, chosen[name], running[name], batch, row, times)
                except Exception as error:  # no room for what is measured beside the time
                    self._failed(rows[name], error)
        del running
        self._release()

    def _conclude(
        self,
        case: Case,
        provider: Provider,
        running: Running,
        batch: Batch,
        row: Row,
        times: Mapping[str, list[float]],
    ) -> None:
        """The row of a provider that was timed, and those of its step's parts."""
        row |= self._measured(provider, running, batch, times[provider.name])
        seconds = row["median"] / 1000
        row["clips_per_s"] = round(case.clips / seconds, 4)
        row["utilisation"] = round(row["flops"] / seconds / dense_bf16_rate(self.device), 4)
        if "plain" in times:
            row |= _speedup(times["plain"], times[provider.name])
        self.report.add(row)
        self._phases(case, provider.name, running, batch)

    def ablation(self, case: Case, group: Ablation) -> None:
        """What each change of `group` alone is worth, beside the provider without it."""
        if group.device not in (None, self.device) or case.positions not in group.sizes:
            return
        batch = case.batch(self.device)
        base = PROVIDERS[group.provider]
        variants = {
            "none": base,
            **{name: base.with_changes(**change) for name, change in group.changes.items()},
        }
        labels = self._labels(case) | {"kind": "ablation", "provider": group.provider}
        rows = {name: labels | {"change": name} for name in variants}
        running = self._started(case, variants, rows)
        times = self._timed(running, batch, rows)
        for name, milliseconds in times.items():
            row = rows[name] | self._measured(variants[name], running[name], batch, milliseconds)
            if "none" in times:
                row["worth"] = _speedup(times["none"], milliseconds)["speedup"]
            self.report.add(row)
        del running
        self._release()

    def _labels(self, case: Case) -> Row:
        return {
            "case": case.name,
            "positions": case.positions,
            "clips": case.clips,
            "device": self.device,
            "threads": torch.get_num_threads(),
        }

    def _started(
        self, case: Case, providers: Mapping[str, Provider], rows: Mapping[str, Row]
    ) -> dict[str, Running]:
        """The providers that can be made."""
        running = {}
        for name, provider in providers.items():
            try:
                running[name] = provider.step(case, self.device)
            except Exception as error:
                self._failed(rows[name], error)
        return running

    def _checked(
        self,
        case: Case,
        providers: Mapping[str, Provider],
        batch: Batch,
        rows: dict[str, Row],
    ) -> dict[str, Running]:
        """Those whose first losses are the literal step's, where that one has room to run."""
        try:
            expected = first_losses(PROVIDERS["plain"].step(case, self.device), batch)
        except Exception as error:
            print(f"Nothing to compare with at {case.name}: {in_short(error)}")
            expected = {}
        running = self._started(case, providers, rows)
        for name in list(running):
            low = providers[name].settings.get("train.precision") == "bf16"
            rows[name]["checked"] = bool(expected)
            try:
                far = distance(first_losses(running[name], batch), expected) if expected else 0.0
            except Exception as error:
                self._failed(rows[name], error)
                del running[name]
                continue
            if not far < FARTHEST["bf16" if low else "fp32"]:
                self.wrong = True
                told = f"not timed: its first losses are {far:.1e} from the literal step's"
                self.report.add(rows[name] | {"error": told})
                del running[name]
        return running

    def _timed(
        self, running: dict[str, Running], batch: Batch, rows: Mapping[str, Row]
    ) -> dict[str, list[float]]:
        """Milliseconds of steps, by provider, of the same rounds; one that fails is left out."""
        failed: dict[str, Exception] = {}

        def guarded(name: str) -> Callable[[], None]:
            def call() -> None:
                if name not in failed:
                    try:
                        running[name](batch)
                    except Exception as error:  # a kernel's, or no room beside the others
                        failed[name] = error
                        gc.collect()

            return call

        calls = {name: guarded(name) for name in running}
        for call in calls.values():
            for _ in range(WARM_UP[self.device]):
                call()
        calls = {name: call for name, call in calls.items() if name not in failed}
        times = interleaved_times(calls, self.device, seconds=self.seconds) if calls else {}
        for name, error in failed.items():
            self._failed(rows[name], error)
        return {name: found for name, found in times.items() if name not in failed}

    def _measured(
        self, provider: Provider, running: Running, batch: Batch, milliseconds: list[float]
    ) -> Row:
        row = timing(milliseconds).row()
        if provider.settings.get("train.cuda_graphs") != "on":  # whose memory is in its own pool
            running.forget_gradients()
            peak = peak_memory(lambda: running(batch), self.device)
            row["peak_mb"] = round(peak, 1)
        return row | {"syncs": syncs(lambda: running(batch), self.device)}

    def _phases(self, case: Case, name: str, running: Running, batch: Batch) -> None:
        """Rows of the parts of a step; one that is replayed or compiled as a whole has fewer."""
        found: dict[str, list[float]] = {}
        for _ in range(PHASE_REPEATS):
            for part, milliseconds in part_times(lambda: running(batch), self.device).items():
                found.setdefault(part, []).append(milliseconds)
        labels = self._labels(case) | {"kind": "phase", "provider": name}
        for part, times in found.items():
            self.report.add(labels | {"phase": part} | timing(times).row())

    def _failed(self, row: Row, error: Exception) -> None:
        self.report.add(row | {"error": in_short(error)})
        gc.collect()

    def _release(self) -> None:
        # A process compiles a function for only so many sizes before it gives up.
        torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _groups(chosen: Mapping[str, Provider], running: Mapping[str, Running]) -> list[list[str]]:
    """What is timed together: a recorded step keeps its memory for good, so it comes last, beside
    the one that all are compared with.
    """
    recorded = [n for n in running if chosen[n].settings.get("train.cuda_graphs") == "on"]
    others = [name for name in running if name not in recorded]
    beside = [name for name in others if name == "plain"]
    groups = [others, beside + recorded if recorded else []]
    return [group for group in groups if group]


def _speedup(slow: list[float], fast: list[float]) -> Row:
    """How many times faster the second is, round by round."""
    found = timing([a / b for a, b in zip(slow, fast, strict=True)])
    return {
        "speedup": round(found.median, 4),
        "speedup_p20": round(found.p20, 4),
        "speedup_p80": round(found.p80, 4),
    }
