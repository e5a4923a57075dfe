"""Which settings go together: the refusals, the README's table, and a run of two steps for every
pair of values that is allowed.
"""

import functools
import math
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, train_flags

from smtc import compatibility, presets
from smtc.cli_parsing import parse_config
from smtc.compatibility import DEVICE, OPTIONS, PROCESSES, RULES, Combination, Rule, spelled
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.pipelines import dali
from smtc.training.telemetry import read_metrics
from smtc.warm_start import WarmStart

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
MEMBERS = compatibility.covering_set()


def flags_of(choices: dict[str, Any]) -> list[object]:
    """The command line that makes these choices, of the smallest run that they allow."""
    warm = choices.get("method") == "warm_start"
    flags: list[object] = ["--preset", "tiny_encoder" if warm else "tiny", "--model.slots", 3]
    if not warm:
        flags += ["--objective.area", 0, "--objective.similarity", -1]
        flags += ["--objective.instance-from-step", 1, "--model.backbone.drop-path", 0.3]
    if choices.get("model.backbone.architecture") == "resnet50":
        flags += ["--model.backbone.patch", 16, "--model.backbone.feature", "tokens"]
    for name, value in choices.items():
        if name not in (PROCESSES, "method") and value is not False:
            flag = f"--{name.replace('_', '-')}"
            flags += [flag] if value is True else [flag, value]
    return flags


def name_of(rule: Rule) -> str:
    return " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in (rule.one, rule.other))


# Refusals.


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.unless], ids=name_of)
def test_a_pair_that_excludes_each_other_is_one_sentence(
    safe: Command, synthetic_data: Path, tmp_path: Path, rule: Rule
) -> None:
    choices = dict((rule.one, rule.other))
    said = safe(*train_flags(synthetic_data, tmp_path / "run", *flags_of(choices)))
    assert said == f"smtc: {rule.sentence()}"
    one, other = (spelled(choice) for choice in (rule.one, rule.other))
    assert f"{one} does not go together with {other}: {rule.reason}; {rule.remedy}." in said


def test_the_sentence_names_flags_that_exist(cli: Command) -> None:
    known = cli("train", "--help").out
    for rule in RULES:
        for flag in re.findall(r"--([a-z.-]+)", rule.sentence()):
            assert f"--{flag}" in known
        remedy = re.search(r"set ([a-z.-]+) to", rule.remedy)
        assert remedy is None or f"--{remedy[1]}" in known


def test_kernels_that_cannot_run_are_refused_for_what_is_missing(
    safe: Command, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smtc.kernels.launching.INTERPRETED", False)
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--model.impl", "triton"))
    assert "--model.impl triton needs a CUDA device" in said and "use auto or eager" in said


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (("model.attention", "xformers"), "pip install xformers in a version for this torch"),
        (("optim.impl", "apex"), "build it from github.com/NVIDIA/apex"),
    ],
)
def test_a_package_that_is_missing_is_refused_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, choice: tuple[str, str], words: str
) -> None:
    from commands import changed

    for module in ("xformers.ops", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, module, None)
    compatibility.attention.load_xformers.cache_clear()
    config = changed(presets.get("tiny"), dict([choice]))
    with pytest.raises(UserError, match=words):
        compatibility.check(config, torch.device("cuda"))


def test_an_xformers_that_was_built_for_another_torch_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It can be imported, with a warning, and fails at its first call."""

    def built_for_another(*_: object) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    monkeypatch.setattr(compatibility.attention, "load_xformers", lambda: built_for_another)
    with pytest.raises(UserError, match=r"has no kernel for torch\.bfloat16 on cpu; .* use sdpa"):
        compatibility.attention.try_xformers(CPU, torch.bfloat16)


def test_without_a_compiler_nothing_can_be_compiled_on_a_cpu(
    safe: Command, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--train.compile", "encoder"))
    assert "--train.compile encoder needs the C++ compiler no-such-compiler" in said
    assert said.endswith("name yours in the environment variable CXX, or use none.")


def test_every_preset_is_allowed() -> None:
    for name in presets.PRESETS:
        compatibility.check(presets.get(name), CPU, processes=2)


def test_rules_know_which_methods_decide_on_the_host() -> None:
    classes = {"smtc": SMTCMethod, "warm_start": WarmStart}
    graphs = {"train.cuda_graphs": "on"}
    for name in OPTIONS["method"]:
        assert compatibility.allowed(graphs | {"method": name}) == classes[name].capturable


def test_rules_speak_of_options_and_their_values() -> None:
    for rule in RULES:
        for name, value in (rule.one, rule.other):
            assert value in OPTIONS[name]


def test_the_readme_shows_the_rules() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- table: options -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert shown is not None and shown[1] == compatibility.table()
    assert compatibility.table().count("\n") == 1 + len(RULES)


# The covering set.


def pairs_of(made: Combination) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(made.items(), 2)}


def allowed_by_trying() -> set[frozenset[tuple[str, Any]]]:
    """Allowed pairs, found another way: whatever else each choice rules out leaves defaults, or
    a GPU, with which everything goes.
    """
    usual = {name: values[0] for name, values in OPTIONS.items()}
    usual |= {"model.impl": "eager"}
    found = set()
    choices = [(name, value) for name, values in OPTIONS.items() for value in values]
    for one, other in combinations(choices, 2):
        for device in OPTIONS[DEVICE]:
            made = usual | {DEVICE: device} | dict((one, other))
            if one[0] != other[0] and compatibility.allowed(made):
                found.add(frozenset((one, other)))
    return found


def test_the_covering_set_covers_every_allowed_pair_and_no_other() -> None:
    covered = set().union(*(pairs_of(made) for made in MEMBERS))
    assert covered == allowed_by_trying()
    assert covered == {frozenset(pair) for pair in compatibility.allowed_pairs()}


def test_what_a_cpu_allows_is_covered_on_a_cpu() -> None:
    there = [made for made in MEMBERS if made[DEVICE] == "cpu"]
    covered = set().union(*(pairs_of(made) for made in there))
    graphs, device = ("train.cuda_graphs", "on"), (DEVICE, "cpu")
    for pair in compatibility.allowed_pairs({DEVICE: "cpu"}):
        assert frozenset(pair) in covered
    assert frozenset((graphs, device)) not in covered


def test_the_covering_set_is_small_whole_and_the_same_each_time() -> None:
    assert len(MEMBERS) <= 30
    for made in MEMBERS:
        assert list(made) == list(OPTIONS)
        assert not any(rule.forbids(made) for rule in RULES if not rule.unless)
    assert compatibility.covering_set() == MEMBERS


def test_members_are_accepted_by_the_check_that_a_run_begins_with(synthetic_data: Path) -> None:
    for made in MEMBERS:
        arguments = train_flags(synthetic_data, "run", *flags_of(made))[1:]
        config = parse_config([str(argument) for argument in arguments])
        assert all(made[name] == value for name, value in compatibility.chosen(config).items())
        if made[DEVICE] == "cpu":
            compatibility.check(config, CPU, made[PROCESSES])


# Two steps of each.

LAUNCHED = """
import functools, os, sys, torch
if os.environ["TRACED"] == "yes":
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
from smtc import cli
cli.main(sys.argv[1:])
"""


def obstacle(made: Combination) -> str | None:
    """Why the member cannot run on this machine."""
    if made[DEVICE] == "cuda":
        if torch.cuda.device_count() < made[PROCESSES]:
            return f"needs {made[PROCESSES]} CUDA devices"
        for option, package in (("model.attention", "xformers"), ("optim.impl", "apex")):
            if made[option] == package and not importable(package):
                return f"needs {package}"
    if made["data.loader"] == "dali":
        return dali.obstacle(made[DEVICE])
    return None


def importable(package: str) -> bool:
    command = [sys.executable, "-c", f"import {package}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def traced(made: Combination) -> bool:
    """Whether the compiler only traces and differentiates, and generates no code, which takes
    minutes on a CPU; what it would generate is compared in training/test_step.py.
    """
    small = made["train.compile"] == "encoder" and "vit" in made["model.backbone.architecture"]
    return made[DEVICE] == "cpu" and not small


@pytest.fixture(scope="session")
def packed(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos' frames, packed."""
    folder = tmp_path_factory.mktemp("packed") / "cache"
    command = ["data", "pack", synthetic_data, "--output", folder, "--size", 32]
    subprocess.run([sys.executable, "-m", "smtc", *map(str, command)], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("made", MEMBERS, ids=lambda made: "-".join(map(str, made.values())))
def test_two_steps(
    cli: Command,
    synthetic_data: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Combination,
) -> None:
    reason = obstacle(made)
    if reason is not None:
        pytest.skip(reason)
    flags = train_flags(synthetic_data, tmp_path / "run", "--data.cache", packed, *flags_of(made))
    if made[PROCESSES] == 1:
        if traced(made):
            backend = functools.partial(torch.compile, backend="aot_eager")
            monkeypatch.setattr(torch, "compile", backend)
        torch.compiler.reset()
        told = cli(*flags)
        assert told.code == 0, told.error
    else:
        launch(tmp_path, flags, made[PROCESSES], traced(made))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] is not None and math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def launch(folder: Path, flags: list[object], processes: int, only_traced: bool) -> None:
    file = folder / "launched.py"
    file.write_text(LAUNCHED, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, str(file), *map(str, flags)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "TRACED": "yes" if only_traced else "no"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
