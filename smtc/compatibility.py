"""Which settings go together: one table. The refusals, the README's list and the combinations that
tests train with all follow from it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from smtc import attention
from smtc.config import Config, flatten, to_dict
from smtc.errors import UserError
from smtc.kernels.dispatch import obstacle
from smtc.training.apex import load_fused_adam

Choice = tuple[str, Any]
Combination = dict[str, Any]

DEVICE, PROCESSES, FROZEN = "train.device", "processes", "optim.encoder_from_step"

OPTIONS: dict[str, tuple[Any, ...]] = {
    DEVICE: ("cpu", "cuda"),
    PROCESSES: (1, 2),
    "method": ("smtc", "warm_start"),
    "model.backbone.architecture": ("vit_tiny", "resnet50"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.compile": ("none", "encoder", "model"),
    "train.cuda_graphs": ("off", "on"),
    "train.checkpoint_activations": (False, True),
    "train.accumulate": (1, 2),
    "model.impl": ("auto", "eager", "triton"),
    "model.attention": ("sdpa", "xformers"),
    "model.gradient": ("straight_through", "full"),
    "model.update": ("residual", "gru"),
    "optim.impl": ("torch", "apex"),
    FROZEN: (0, -1),
    "data.spatial": ("shared", "independent"),
    "data.loader": ("torch", "cache", "dali"),
}
"""What is combined, and with which values. `processes` is no setting; torchrun decides it."""


@dataclass(frozen=True)
class Rule:
    """Two choices that exclude each other."""

    one: Choice
    other: Choice
    reason: str
    remedy: str
    unless: str = ""
    """What lifts the rule; whether it is there is asked elsewhere."""

    def forbids(self, choices: Mapping[str, Any]) -> bool:
        """Whether both choices are among `choices`."""
        return all(choices.get(name) == value for name, value in (self.one, self.other))

    def sentence(self) -> str:
        """For the user who made both choices."""
        return (
            f"{spelled(self.one)} does not go together with {spelled(self.other)}: {self.reason}; "
            f"{self.remedy}."
        )


_GRAPHS: Choice = ("train.cuda_graphs", "on")
_XFORMERS: Choice = ("model.attention", "xformers")
_WARM_START: Choice = ("method", "warm_start")
_RESNET: Choice = ("model.backbone.architecture", "resnet50")
_CPU: Choice = (DEVICE, "cpu")
_UNTRIED = "xformers' operators were never tried under torch.compile"

RULES = (
    Rule(
        *(_WARM_START, (FROZEN, -1)),
        reason="the warm start trains the encoder from its first step on",
        remedy="set optim.encoder-from-step to 0",
    ),
    Rule(
        *(_WARM_START, ("data.spatial", "independent")),
        reason="the warm start pairs places of two views that show the same crop",
        remedy="set data.spatial to shared",
    ),
    Rule(
        *(("train.compile", "model"), _WARM_START),
        reason="only SMTC has a part after the encoder that is compiled",
        remedy="use encoder",
    ),
    Rule(
        *(_GRAPHS, _WARM_START),
        reason="it decides on the host, step by step, whether a batch is grey",
        remedy="use off",
    ),
    Rule(
        *(_GRAPHS, ("train.precision", "fp16")),
        reason="the scale of the loss was never tried inside a CUDA graph",
        remedy="use bf16",
    ),
    Rule(
        *(("train.checkpoint_activations", True), _RESNET),
        reason="only the blocks of a vision transformer are computed again",
        remedy="leave it out",
    ),
    Rule(*(_XFORMERS, _RESNET), reason="it has no attention", remedy="use sdpa"),
    Rule(*(_XFORMERS, ("train.compile", "encoder")), reason=_UNTRIED, remedy="use sdpa"),
    Rule(*(_XFORMERS, ("train.compile", "model")), reason=_UNTRIED, remedy="use sdpa"),
    Rule(*(_XFORMERS, _CPU), reason="xformers has no kernel for CPUs", remedy="use sdpa"),
    Rule(*(_GRAPHS, _CPU), reason="only a CUDA device has them", remedy="use off"),
    Rule(
        *(("optim.impl", "apex"), _CPU),
        reason="apex has no kernel for CPUs",
        remedy="use torch",
    ),
    Rule(
        *(("model.impl", "triton"), _CPU),
        reason="the kernels are compiled for a CUDA device",
        remedy="use auto or eager",
        unless="TRITON_INTERPRET=1",
    ),
)
"""Those about settings alone come first: a user learns of them on any machine."""


def spelled(choice: Choice) -> str:
    """A choice as the command line has it."""
    name, value = choice
    flag = f"--{name.replace('_', '-')}"
    if choice == _CPU:
        return "a CPU (--train.device cpu)"
    if name == FROZEN and value != 0:
        return f"{flag} other than 0"
    return flag if value is True else f"{flag} {value}"


def check(config: Config, device: torch.device, processes: int = 1) -> None:
    """Whether a run with these settings can start. Errors: `UserError` with the first rule broken,
    or with what the machine lacks for a choice.
    """
    _refuse(chosen(config) | {DEVICE: device.type, PROCESSES: processes})
    reason = obstacle(device) if config.model.impl == "triton" else None
    if reason is not None:
        raise UserError(f"--model.impl triton {reason}; use auto or eager.")
    if config.model.attention == "xformers":
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}
        attention.try_xformers(device, low.get(config.train.precision, torch.float32))
    if config.optim.impl == "apex":
        load_fused_adam()
    compiler = os.environ.get("CXX", "g++")  # what torch asks for
    if config.train.compile != "none" and device.type == "cpu" and not shutil.which(compiler):
        raise UserError(
            f"--train.compile {config.train.compile} needs the C++ compiler {compiler}, which is "
            "not there; install one, name yours in the environment variable CXX, or use none."
        )


def check_settings(config: Config, method: str) -> None:
    """The rules about settings alone, for `method`. Errors: `UserError`."""
    _refuse(chosen(replace(config, method=method)))  # type: ignore[arg-type]


def chosen(config: Config) -> Combination:
    """The values of `OPTIONS` that the settings alone decide."""
    values = flatten(to_dict(config))
    found = {name: values[name] for name in OPTIONS if name not in (DEVICE, PROCESSES)}
    return found | {FROZEN: 0 if found[FROZEN] == 0 else -1}


def _refuse(made: Combination) -> None:
    for rule in RULES:
        if rule.forbids(made) and not rule.unless:
            raise UserError(rule.sentence())


def table() -> str:
    """The rules as a table in Markdown."""
    lines = ["| option | not with | because | remedy |", "|---|---|---|---|"]
    for rule in RULES:
        other = f"`{spelled(rule.other)}`"
        if rule.other == _CPU:
            other = "a CPU" + (f" (unless `{rule.unless}`)" if rule.unless else "")
        lines.append(f"| `{spelled(rule.one)}` | {other} | {rule.reason} | {rule.remedy} |")
    return "\n".join(lines)


def allowed(made: Mapping[str, Any]) -> bool:
    """Whether no rule stands against `made`; what may lift a rule counts as given."""
    return not any(rule.forbids(made) and not rule.unless for rule in RULES)


def allowed_pairs(given: Mapping[str, Any] | None = None) -> list[tuple[Choice, Choice]]:
    """Every two choices that some allowed combination with `given` contains."""
    given = given or {}
    return [
        (one, other)
        for one, other in combinations(_choices(), 2)
        if one[0] != other[0]
        and all(given.get(name, value) == value for name, value in (one, other))
        and _can_be_completed(dict(given) | dict((one, other)))
    ]


def covering_set() -> list[Combination]:
    """Few allowed combinations that contain every allowed pair of choices.

    First come those on a CPU, which by themselves contain every pair that a CPU allows.
    """
    found: list[Combination] = []
    for given in ({DEVICE: "cpu"}, {}):
        done = {pair for made in found for pair in combinations(_in_order(made), 2)}
        left = [pair for pair in allowed_pairs(given) if pair not in done]
        while left:
            found.append(_covering(left, given))
            new = set(combinations(_in_order(found[-1]), 2))
            left = [pair for pair in left if pair not in new]
    return found


def _covering(left: list[tuple[Choice, Choice]], given: Mapping[str, Any]) -> Combination:
    """A combination with the first pair of `left` and, greedily, as many others as it takes."""
    made = dict(given) | dict(left[0])
    wanted = set(left)
    for name, values in OPTIONS.items():
        if name in made:
            continue
        possible = [value for value in values if _can_be_completed(made | {name: value})]
        made[name] = max(
            possible,
            key=lambda value: len(
                wanted.intersection(combinations(_in_order(made | {name: value}), 2))
            ),
        )
    return dict(_in_order(made))


def _choices() -> Iterator[Choice]:
    for name, values in OPTIONS.items():
        yield from ((name, value) for value in values)


def _in_order(made: Mapping[str, Any]) -> list[Choice]:
    return [(name, made[name]) for name in OPTIONS if name in made]


def _can_be_completed(made: Combination) -> bool:
    """Whether values of the other options exist with which no rule is broken."""
    if not allowed(made):
        return False
    missing = next((name for name in OPTIONS if name not in made), None)
    if missing is None:
        return True
    return any(_can_be_completed(made | {missing: value}) for value in OPTIONS[missing])
