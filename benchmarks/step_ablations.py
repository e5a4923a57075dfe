"""What single changes of a step are worth: the literal step with one fault more or one slow part
less, and the fastest form without one of its means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smtc.benchmarks.plain import FAULTS, RELIEFS

Change = Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """Changes of one provider, each alone."""

    provider: str
    changes: Mapping[str, Change]
    """By name: arguments of `Provider.with_changes`."""
    device: str | None = None
    """Where they mean anything; None: everywhere."""
    sizes: tuple[int, ...] = (256,)
    """Positions at which they are measured."""


_FROZEN = {"optim.encoder_from_step": -1}
_PLAIN: dict[str, Change] = {
    **{f"fault {name}": {"faults": (name,)} for name in FAULTS if name != "frozen_backward"},
    **{f"relief {name}": {"reliefs": (name,)} for name in RELIEFS},
    "frozen encoder": {"settings": _FROZEN},
    "frozen encoder, fault frozen_backward": {
        "settings": _FROZEN,
        "faults": ("frozen_backward",),
    },
}
_OURS: dict[str, Change] = {
    "compile encoder": {"settings": {"train.compile": "encoder"}},
    "compile none": {"settings": {"train.compile": "none"}},
    "fp32": {"settings": {"train.precision": "fp32"}},
    "frozen encoder": {"settings": _FROZEN},
    "checkpoint_activations": {"settings": {"train.checkpoint_activations": True}},
}
_GRAPHS: dict[str, Change] = {
    "cuda_graphs off": {"settings": {"train.cuda_graphs": "off"}},
    "compile model": {"settings": {"train.compile": "model"}},
    "frozen encoder": {"settings": _FROZEN},
    "checkpoint_activations": {"settings": {"train.checkpoint_activations": True}},
    "xformers": {"settings": {"model.attention": "xformers"}},
    "apex": {"settings": {"optim.impl": "apex"}},
}

ABLATIONS = (
    Ablation("plain", _PLAIN),
    Ablation("compile", _OURS),
    Ablation("triton+graphs", _GRAPHS, device="cuda", sizes=(256, 1024)),
)
