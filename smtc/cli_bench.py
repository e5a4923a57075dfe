"""`smtc bench …`: each command's flags and what it calls."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from smtc.cli_parsing import parse
from smtc.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Bench:
    output: Path
    """The folder for the results."""
    ops: tuple[str, ...] = ()
    """Operations of smtc.kernels; all when not given."""


@dataclass(frozen=True, kw_only=True)
class _BenchParity(_Bench):
    """Compare every operation, forward and backward, with the oracle in float64.

    Prints the worst errors, writes parity.json, exits with 1 after a miss.
    """

    impl: Literal["auto", "eager", "triton"] = "auto"
    """auto: the Triton kernels where they can run, else plain torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchKernels(_Bench):
    """Time every operation, forward, backward and both, for each provider.

    Prints tables and writes kernels.json. What fails its parity check is not timed.
    """

    sizes: tuple[int, ...] = ()
    """Positions L; 256 1024 1500 when not given, on a CPU 64 256."""
    providers: tuple[str, ...] = ()
    """Of triton, eager-bf16, eager-fp32, compile, plain, scipy, pot; all that can run here when
    not given."""
    clips: int | None = None
    """Clips a batch; 32 when not given, on a CPU 1."""
    seconds: float = 0.2
    """How long to repeat a call, about."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchData:
    """Count the clips that each loader makes, beside a plain DataLoader with PIL or OpenCV.

    Prints tables and writes data.json. Takes about five minutes on two cores.
    """

    output: Path
    """The folder for the results."""
    data: Path | None = None
    """A folder of videos, as frames, of which a few are copied; else some are written."""
    providers: tuple[str, ...] = ()
    """Of torch, cache, dali, pil, opencv; all when not given."""
    cases: tuple[str, ...] = ()
    """Of 720p, 480p, packed; all when not given."""
    threads: tuple[int, ...] = ()
    """Worker processes, or threads of DALI; 1 2 when not given, with a GPU 4 and all cores."""
    clips: int | None = None
    """Clips a batch; 4 when not given, with a GPU 32."""
    seconds: float = 5.0
    """How long to measure each loader."""
    steps: int = 30
    """Steps of a training run with each loader, whose waits are measured; 0: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchStep:
    """Time a whole training step for each provider, beside the paper's equations taken literally.

    Prints tables and writes step.json. One case without flags, in at most ten minutes.
    """

    output: Path
    """The folder for the results."""
    preset: str = "fixed"
    """Whose settings a step has, but that its encoder learns and all losses count."""
    sizes: tuple[int, ...] = (256,)
    """Positions L: 256, 1024, 1500, or a square."""
    clips: tuple[int, ...] = ()
    """Clips a batch; 32 when not given, on a CPU 2."""
    providers: tuple[str, ...] = ()
    """Of plain, eager-fp32, eager-bf16, compile, triton, triton+compile, triton+graphs; all that
    can run here when not given."""
    ablation: bool = False
    """Also measure what single changes are worth."""
    seconds: float = 10.0
    """How long to repeat each provider's step, about."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchMemory:
    """Measure the memory of a step at many sizes, fit a law to it and say what fits.

    Prints tables and writes memory.json. Takes about five minutes on two cores.
    """

    output: Path
    """The folder for the results."""
    preset: str = "fixed"
    """Whose settings a step has, but that its encoder learns and all losses count."""
    providers: tuple[str, ...] = ()
    """Of plain, eager-fp32, eager-bf16, eager-bf16+recompute (activations are computed again),
    compile, triton, triton+compile; all that can run here, but those that compile, when not
    given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchQuality:
    """Train the preset tiny in fp32 and in the fastest form, over seeds, and compare the scores.

    Prints tables and writes quality.json, where what was there of the same settings is kept: a
    benchmark that was stopped goes on. Takes about half an hour on two cores.
    """

    output: Path
    """The folder for the results, and for the runs under quality/."""
    seeds: int = 5
    """So many, from 0."""
    steps: int = 500
    """Of SMTC."""
    warm_steps: int = 700
    """Of the encoder's warm start, which both forms share."""
    data: Path = Path("data/synthetic")
    """With train/ and val/, which are written where they are missing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchScaling:
    """Time steps on 1, 2, 4, … processes of this machine: weak and strong scaling.

    Prints tables and writes scaling.json. Takes about a minute on two cores.
    """

    output: Path
    """The folder for the results."""
    preset: str | None = None
    """Whose settings a step has; fixed when not given, on a CPU tiny."""
    size: int | None = None
    """Positions L; 256 when not given, on a CPU 64."""
    provider: str | None = None
    """Of the providers of a step but plain; triton when not given, on a CPU eager-fp32."""
    ranks: tuple[int, ...] = ()
    """Numbers of processes; 1 2 4 … up to the GPUs, or cores, when not given."""
    clips: int | None = None
    """Of one process alone; 32 when not given, on a CPU 8."""
    seconds: float = 5.0
    """How long to repeat a step, about."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchProfile:
    """Record a few steps: a Chrome trace, the operators or kernels that take longest, the gaps.

    Writes trace.json.gz (for ui.perfetto.dev) and profile.json, and prints tables. On a CPU the
    gaps are what the main thread spends outside of any operator.
    """

    output: Path
    """The folder for the results."""
    preset: str = "fixed"
    """Whose settings a step has, but that its encoder learns and all losses count."""
    size: int = 256
    """Positions L: 256, 1024, 1500, or a square."""
    clips: int | None = None
    """Clips a batch; 32 when not given, on a CPU 1."""
    provider: str | None = None
    """Of the providers of a step; triton when not given, on a CPU eager-bf16."""
    steps: int = 3
    """Recorded, after those that warm up."""
    top: int = 20
    """Kernels and gaps shown."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchTune(_Bench):
    """Search for faster launch options on a GPU and print rows for kernels/tuning.py."""

    sizes: tuple[int, ...] = ()
    """Positions L; 256 1024 1500 when not given."""
    clips: int | None = None
    """Clips a batch; 32 when not given."""
    seconds: float = 0.05
    """How long to repeat a candidate, about."""


@dataclass(frozen=True, kw_only=True)
class _BenchStatic(_Bench):
    """Compile every kernel for GPUs that are not here and hold it against its budget."""

    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
    """Of sm_80, sm_90, sm_100."""


@dataclass(frozen=True, kw_only=True)
class _BenchReport:
    """Print a benchmark folder's results and write them as one page, report.html.

    Needs no network, nor does the page. With --readme only that file's tables are written.
    """

    folder: tyro.conf.Positional[Path | None] = None
    """With the JSON files; the checkout's recorded results when not given."""
    output: Path | None = None
    """The page; report.html in the folder when not given."""
    readme: Path | None = None
    """A file whose tables are written anew, each between lines <!-- table: NAME --> and
    <!-- end -->."""


@dataclass(frozen=True, kw_only=True)
class _BenchCompare:
    """Compare two results of one benchmark, before and after a change; the worst comes last.

    Exits with 1 where something is slower, takes more memory or fails now: the change is above
    the threshold and the ranges from the 20th to the 80th percentile do not touch.
    """

    a: tyro.conf.Positional[Path]
    """A report's JSON file, or a folder of them."""
    b: tyro.conf.Positional[Path]
    """The same, after the change."""
    threshold: float = 0.05
    """The least relative change that counts."""


def _bench_kernels(arguments: list[str]) -> None:
    """time the operations against plain torch and peers"""
    settings = parse(_BenchKernels, "bench kernels", arguments)
    from smtc.benchmarks import kernels

    sys.exit(kernels.run(**vars(settings)))


def _bench_parity(arguments: list[str]) -> None:
    """errors of the operations against float64"""
    settings = parse(_BenchParity, "bench parity", arguments)
    from smtc.benchmarks import parity

    sys.exit(parity.run(**vars(settings)))


def _bench_static(arguments: list[str]) -> None:
    """registers and memory of the kernels on GPUs that are not here"""
    settings = parse(_BenchStatic, "bench static", arguments)
    from smtc.benchmarks import static

    sys.exit(static.run(**vars(settings)))


def _bench_step(arguments: list[str]) -> None:
    """time a whole training step against the literal one"""
    settings = parse(_BenchStep, "bench step", arguments)
    from smtc.benchmarks import step

    sys.exit(step.run(**vars(settings)))


def _bench_memory(arguments: list[str]) -> None:
    """memory of a step by size, and what fits"""
    settings = parse(_BenchMemory, "bench memory", arguments)
    from smtc.benchmarks import memory

    sys.exit(memory.run(**vars(settings)))


def _bench_quality(arguments: list[str]) -> None:
    """whether the fastest training scores as well as fp32"""
    settings = parse(_BenchQuality, "bench quality", arguments)
    from smtc.benchmarks import quality

    sys.exit(quality.run(**vars(settings)))


def _bench_scaling(arguments: list[str]) -> None:
    """steps on several processes"""
    settings = parse(_BenchScaling, "bench scaling", arguments)
    from smtc.benchmarks import scaling

    sys.exit(scaling.run(**vars(settings)))


def _bench_profile(arguments: list[str]) -> None:
    """a trace of a step, its longest operators and its gaps"""
    settings = parse(_BenchProfile, "bench profile", arguments)
    from smtc.benchmarks import profiling

    sys.exit(profiling.run(**vars(settings)))


def _bench_tune(arguments: list[str]) -> None:
    """search for faster launch options on a GPU"""
    settings = parse(_BenchTune, "bench tune", arguments)
    from smtc.benchmarks import tune

    sys.exit(tune.run(**vars(settings)))


def _bench_data(arguments: list[str]) -> None:
    """clips a second of the loaders, beside PIL and OpenCV"""
    settings = parse(_BenchData, "bench data", arguments)
    from smtc.benchmarks import data

    sys.exit(data.run(**vars(settings)))


def _bench_report(arguments: list[str]) -> None:
    """a benchmark folder as one HTML page, or as the README's tables"""
    settings = parse(_BenchReport, "bench report", arguments)
    from smtc.benchmarks import readme, report

    if settings.readme is not None:
        if settings.output is not None:
            raise UserError("--output is for the page, which --readme does not write.")
        sys.exit(readme.run(settings.readme, settings.folder))
    sys.exit(report.run(settings.folder, output=settings.output))


def _bench_compare(arguments: list[str]) -> None:
    """what became slower or faster between two results"""
    settings = parse(_BenchCompare, "bench compare", arguments)
    from smtc.benchmarks import compare

    sys.exit(compare.run(settings.a, settings.b, threshold=settings.threshold))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "bench kernels": _bench_kernels,
    "bench parity": _bench_parity,
    "bench static": _bench_static,
    "bench tune": _bench_tune,
    "bench data": _bench_data,
    "bench step": _bench_step,
    "bench memory": _bench_memory,
    "bench quality": _bench_quality,
    "bench scaling": _bench_scaling,
    "bench profile": _bench_profile,
    "bench report": _bench_report,
    "bench compare": _bench_compare,
}
