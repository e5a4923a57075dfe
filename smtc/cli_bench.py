"""`smtc bench …`: each command's flags and what it calls."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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

    For example: smtc bench parity --output build/bench

    Prints the worst errors, writes parity.json, exits with 1 after a miss.
    """

    impl: Literal["auto", "eager", "triton"] = "auto"
    """auto: the Triton kernels where they can run, else plain torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class _BenchKernels(_Bench):
    """Time every operation, forward, backward and both, for each provider.

    For example: smtc bench kernels --output build/bench --ops sinkhorn --sizes 256

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

    For example: smtc bench data --output build/bench --providers torch pil

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

    For example: smtc bench step --output build/bench --providers plain eager-bf16

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

    For example: smtc bench memory --output build/bench

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

    For example: smtc bench quality --output build/bench --seeds 3

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

    For example: smtc bench scaling --output build/bench --ranks 1 2

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

    For example: smtc bench profile --output build/bench --preset tiny

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
    """Search for faster launch options on a GPU and print rows for kernels/tuning.py.

    For example: smtc bench tune --output build/bench --ops sinkhorn
    """

    sizes: tuple[int, ...] = ()
    """Positions L; 256 1024 1500 when not given."""
    clips: int | None = None
    """Clips a batch; 32 when not given."""
    seconds: float = 0.05
    """How long to repeat a candidate, about."""


@dataclass(frozen=True, kw_only=True)
class _BenchStatic(_Bench):
    """Compile every kernel for GPUs that are not here and hold it against its budget.

    For example: smtc bench static --output build/bench --architectures sm_90
    """

    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
    """Of sm_80, sm_90, sm_100."""


@dataclass(frozen=True, kw_only=True)
class _BenchReport:
    """Print a benchmark folder's results and write them as one page, report.html.

    For example: smtc bench report build/bench

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

    For example: smtc bench compare build/before build/bench

    Exits with 1 where something is slower, takes more memory or fails now: the change is above
    the threshold and the ranges from the 20th to the 80th percentile do not touch.
    """

    before: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BEFORE")]
    """A report's JSON file, or a folder of them."""
    after: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AFTER")]
    """The same, after the change."""
    threshold: float = 0.05
    """The least relative change that counts."""


def _command(name: str, settings: type, module: str, sentence: str) -> Callable[[list[str]], None]:
    """The command that passes its flags to `run` of a module, which is imported only then."""

    def command(arguments: list[str]) -> None:
        parsed: Any = parse(settings, f"bench {name}", arguments)
        found = importlib.import_module(f"smtc.benchmarks.{module}")
        sys.exit(found.run(**vars(parsed)))

    command.__doc__ = sentence
    return command


def _report(arguments: list[str]) -> None:
    """a benchmark folder as one HTML page, or as the README's tables"""
    settings = parse(_BenchReport, "bench report", arguments)
    from smtc.benchmarks import readme, report

    if settings.readme is not None:
        if settings.output is not None:
            raise UserError("--output is for the page, which --readme does not write.")
        sys.exit(readme.run(settings.readme, settings.folder))
    sys.exit(report.run(settings.folder, output=settings.output))


_PLAIN: dict[str, tuple[type, str, str]] = {
    "kernels": (_BenchKernels, "kernels", "time the operations against plain torch and peers"),
    "parity": (_BenchParity, "parity", "errors of the operations against float64"),
    "static": (
        *(_BenchStatic, "static"),
        "registers and memory of the kernels on GPUs that are not here",
    ),
    "tune": (_BenchTune, "tune", "search for faster launch options on a GPU"),
    "data": (_BenchData, "data", "clips a second of the loaders, beside PIL and OpenCV"),
    "step": (_BenchStep, "step", "time a whole training step against the literal one"),
    "memory": (_BenchMemory, "memory", "memory of a step by size, and what fits"),
    "quality": (
        *(_BenchQuality, "quality"),
        "whether the fastest training scores as well as fp32",
    ),
    "scaling": (_BenchScaling, "scaling", "steps on several processes"),
    "profile": (
        *(_BenchProfile, "profiling"),
        "a trace of a step, its longest operators and its gaps",
    ),
    "compare": (_BenchCompare, "compare", "what became slower or faster between two results"),
}
"""By name: the flags, the module of `smtc.benchmarks`, and what it does."""

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{f"bench {name}": _command(name, *of) for name, of in _PLAIN.items()},
    "bench report": _report,
}
