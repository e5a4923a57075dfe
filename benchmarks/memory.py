"""How much memory does a step need? Peaks at many sizes, a law fitted to them, and what fits.

A process that trains holds weights, the teacher's, moments and a batch (`held_mb`); a step needs
more on top, gradients among it (`peak_mb`, its most beyond what was held before it). The law is for
their sum, as a function of L positions, B clips, T frames and N slots:

    held + peak = max(floor, fixed + Σ coefficient · feature)

The floor is what optimiser and momentum need at any size, read off the smallest one. The other
coefficients are fitted by least squares of the relative errors, none below zero, to sizes above the
floor. The worst error is that of sizes that the fit has not seen (`fitted` false in their rows).
A largest batch "by law" is extrapolated from this device's law, far beyond the sizes measured and,
from a CPU, to the memory of a GPU that keeps other temporaries; on a GPU it is measured.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from smtc import presets
from smtc.benchmarks import parity
from smtc.benchmarks.blocks import markdown
from smtc.benchmarks.harness import MEGABYTE, Report, peak_memory, pick_device
from smtc.benchmarks.quiet import untrained_allowed
from smtc.benchmarks.step_providers import PROVIDERS, Case, Provider, pick_providers
from smtc.benchmarks.step_tables import memory_blocks
from smtc.errors import UserError
from smtc.progress import track

Row = dict[str, Any]


class Size(NamedTuple):
    """Of a step: L, B, T and N."""

    positions: int
    clips: int
    frames: int = 4
    slots: int = 16


SMALLEST = Size(64, 1, 2)
FITTED = (
    SMALLEST,
    Size(256, 1),
    *(Size(400, 1), Size(576, 1), Size(256, 2), Size(256, 3)),
    *(Size(256, 1, frames=2), Size(256, 1, frames=6)),
    *(Size(256, 1, slots=8), Size(256, 1, slots=48)),
    *(Size(576, 1, frames=2), Size(1024, 1, frames=2)),
)
"""One of L, B, T and N changed at a time from the second on; two clips of two frames at last."""
HELD_OUT = (Size(324, 2, 3, 24), Size(484, 1, 5, 8), Size(784, 1, 3))
LIMIT_POSITIONS = (256, 1024, 1500)
MEMORIES_MB = (80_000, 141_000)
"""Of an H100 or A100, and of an H200."""
RECOMPUTED = Provider(
    "eager-bf16+recompute",
    {**PROVIDERS["eager-bf16"].settings, "train.checkpoint_activations": True},
)
_COMPILED = "compile"
_SLACK = 1.03
"""What is less above the floor lies on it."""
_MOST_CLIPS = 2**24

FEATURES: dict[str, Callable[[Size], int]] = {
    "B·T·L": lambda s: s.clips * s.frames * s.positions,
    "B·T·N·L": lambda s: s.clips * s.frames * s.slots * s.positions,
    "B·N·L²": lambda s: s.clips * s.slots * s.positions**2,
    "B·T·L²": lambda s: s.clips * s.frames * s.positions**2,
    "B·T·(T−1)·L²": lambda s: s.clips * s.frames * (s.frames - 1) * s.positions**2,
    "L²": lambda s: s.positions**2,
}
EAGER_FEATURES = ("B·T·L", "B·T·N·L", "B·T·L²", "B·T·(T−1)·L²")
"""Activations, masks and logits, correlations, and the pairs of all frames at once."""
PLAIN_FEATURES = ("B·T·L", "B·T·N·L", "B·N·L²", "B·T·L²")
"""Activations, masks and logits, one pair of frames, and the encoder's attention."""
FUSED_FEATURES = ("B·T·L", "B·T·N·L", "L²")
"""Activations, masks and logits, and a Gram matrix of a few clips."""


@dataclass(frozen=True)
class Law:
    """Megabytes of a step as a function of its size."""

    floor: float
    fixed: float
    slopes: Mapping[str, float]
    """Megabytes a unit of a feature."""

    def __call__(self, size: Size) -> float:
        """Megabytes that are held at most."""
        grown = sum(slope * FEATURES[name](size) for name, slope in self.slopes.items())
        return max(self.floor, self.fixed + grown)

    def row(self) -> Row:
        """As columns of a report."""
        letters = dict(zip(self.slopes, "abcdef", strict=False))
        terms = ["fixed", *(f"{letter}·{name}" for name, letter in letters.items())]
        values = {"floor (MB)": self.floor, "fixed (MB)": self.fixed}
        slopes = {f"{letters[name]} (bytes)": s * MEGABYTE for name, s in self.slopes.items()}
        return {
            "law": f"held + peak = max(floor, {' + '.join(terms)})",
            "coefficients": {key: round(value, 3) for key, value in (values | slopes).items()},
        }


def fit(totals: Mapping[Size, float], features: Sequence[str]) -> Law:
    """The law of `features` that fits megabytes by size best; `SMALLEST` is the floor.

    `UserError` where too few sizes lie above it.
    """
    floor = totals[SMALLEST]
    above = {size: total for size, total in totals.items() if total > _SLACK * floor}
    if len(above) <= len(features):
        raise UserError(f"{len(above)} sizes above the floor are too few to fit a law.")
    columns = [[1.0, *(float(FEATURES[name](size)) for name in features)] for size in above]
    # Divided by the total, so that the relative error counts; the features by their mean, so that
    # all have a like scale.
    matrix = np.array(columns) / np.array(list(above.values()))[:, None]
    scales = matrix.mean(axis=0)
    solved, _ = nnls(matrix / scales, np.ones(len(above)))
    fixed, *slopes = (float(value) for value in solved / scales)
    return Law(floor, fixed, dict(zip(features, slopes, strict=True)))


def worst_error(law: Law, totals: Mapping[Size, float]) -> float:
    """The largest relative error of the law."""
    return max(abs(law(size) - total) / total for size, total in totals.items())


def largest(fits: Callable[[int], bool], most: int = _MOST_CLIPS) -> int:
    """The largest number up to `most` for which `fits`, by doubling, then halving the interval;
    0 where none does.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run(
    output: Path,
    *,
    preset: str = "fixed",
    providers: Sequence[str] = (),
    device: str = "auto",
) -> int:
    """Measure, fit, print tables and write `output`/memory.json.

    Args:
        output: the folder.
        preset: whose settings a step has, but that its encoder learns and all losses count.
        providers: of those of a step, or "eager-bf16+recompute"; without any all that can run,
            but those that compile, which takes a minute for every size.
        device: "cuda", "cpu" or "auto".

    Returns:
        an exit code: 1 where nothing could be measured.
    """
    device = pick_device(device)
    chosen = chosen_providers(providers, device)
    if presets.get(preset).method != "smtc":
        raise UserError(f"--preset {preset} trains no SMTC; bench memory takes the others.")
    bench = _Bench(Report(output / "memory.json"), preset, device)
    bench.describe()
    sizes = [(provider, size) for provider in chosen for size in (*FITTED, *HELD_OUT)]
    with untrained_allowed():
        for provider, size in track(sizes, title=f"memory on {device}", unit="size"):
            bench.measure(provider, size)
        for provider in chosen:
            bench.conclude(provider)
    print(markdown(memory_blocks(bench.report.rows)))
    print(f"{len(bench.report.rows)} rows in {bench.report.path}")
    return 0 if bench.totals else 1


def chosen_providers(names: Sequence[str], device: str) -> list[Provider]:
    """Those of `names`; `UserError` for one that is unknown or cannot be measured here."""
    others = tuple(name for name in names if name != RECOMPUTED.name)
    if "triton+graphs" in others:
        raise UserError(
            "--providers triton+graphs keeps its memory in the pool of its graph, which is not "
            "counted here; leave it out."
        )
    if not names:
        able = [p for p in pick_providers((), device) if _COMPILED not in p.name]
        return [*(p for p in able if p.name != "triton+graphs"), RECOMPUTED]
    found = pick_providers(others, device) if others else []
    return [*found, *([RECOMPUTED] if RECOMPUTED.name in names else [])]


class _Bench:
    """Measures sizes into a report."""

    def __init__(self, report: Report, preset: str, device: str) -> None:
        self.report, self.preset, self.device = report, preset, device
        self.totals: dict[str, dict[Size, float]] = {}
        """Megabytes by provider and size."""

    def describe(self) -> None:
        """A row of what all others have in common."""
        same = {"preset": self.preset, "device": self.device}
        by = "law of this device, extrapolated" if self.device == "cpu" else "measured"
        self.report.add({"kind": "settings", **same, "largest that fits": by})

    def measure(self, provider: Provider, size: Size) -> None:
        """A row of the second step's peak at a size."""
        row: Row = {"kind": "peak", "provider": provider.name}
        row |= dict(zip("LBTN", size, strict=True)) | {"fitted": size in FITTED}
        try:
            held, peak = held_and_peak(provider, self._case(size), self.device)
        except Exception as error:  # of memory, or of a kernel
            self.report.add(row | {"error": parity.sentence(error)})
        else:
            self.report.add(row | {"peak_mb": round(peak, 1), "held_mb": round(held, 1)})
            self.totals.setdefault(provider.name, {})[size] = held + peak
        finally:
            self._release()

    def conclude(self, provider: Provider) -> None:
        """Rows of the law, and of what fits."""
        totals = self.totals.get(provider.name, {})
        seen = {size: total for size, total in totals.items() if size in FITTED}
        unseen = {size: total for size, total in totals.items() if size in HELD_OUT}
        row: Row = {"kind": "law", "provider": provider.name}
        try:
            if SMALLEST not in seen or not unseen:
                raise UserError("The smallest size or all held-out sizes could not be measured.")
            law = fit(seen, features_of(provider))
        except UserError as error:
            self.report.add(row | {"error": str(error)})
            return
        self.report.add(row | law.row() | {"worst_error": round(worst_error(law, unseen), 4)})
        for positions in LIMIT_POSITIONS:
            if self.device == "cuda":
                self._measured_limit(provider, positions)
            else:
                self._limit_by_law(provider, law, positions)

    def _limit_by_law(self, provider: Provider, law: Law, positions: int) -> None:
        for memory in MEMORIES_MB:

            def fits(clips: int, memory: int = memory) -> bool:
                return law(Size(positions, clips)) <= memory

            row = self._limit_row(provider, positions, memory, largest(fits))
            self.report.add(row | {"by": "law", "law_of": self.device})

    def _measured_limit(self, provider: Provider, positions: int) -> None:
        """Where this GPU's memory runs out. Never run: there was no GPU."""

        def fits(clips: int) -> bool:
            try:
                held_and_peak(provider, self._case(Size(positions, clips)), self.device)
            except RuntimeError:  # what runs out need not be the allocator
                return False
            finally:
                self._release()
            return True

        memory = torch.cuda.get_device_properties(0).total_memory // MEGABYTE
        row = self._limit_row(provider, positions, memory, largest(fits))
        self.report.add(row | {"by": "measured"})

    def _limit_row(self, provider: Provider, positions: int, memory: int, clips: int) -> Row:
        size = dict(zip("LBTN", Size(positions, clips), strict=True))
        return {"kind": "limit", "provider": provider.name, "memory_mb": memory, **size}

    def _case(self, size: Size) -> Case:
        return Case(self.preset, *size)

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def features_of(provider: Provider) -> tuple[str, ...]:
    """What grows with the size in this provider's step."""
    if provider.plain:
        return PLAIN_FEATURES
    return FUSED_FEATURES if provider.name.startswith("triton") else EAGER_FEATURES


def held_and_peak(provider: Provider, case: Case, device: str) -> tuple[float, float]:
    """Megabytes held between two steps, and what the second one needs beyond them."""
    if "train.compile" in provider.settings:
        # A process compiles a function for only so many sizes before it gives up.
        torch.compiler.reset()
    before = held_memory(device)
    running, batch = provider.step(case, device), case.batch(device)
    running(batch)  # the moments are there from here on
    running.forget_gradients()  # every step begins with that
    held = held_memory(device) - before
    return held, peak_memory(lambda: running(batch), device)


def held_memory(device: str) -> float:
    """Megabytes of all tensors; on a CPU those that Python's garbage collector can see, each
    storage once.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / MEGABYTE
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / MEGABYTE
