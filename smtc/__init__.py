"""Self-supervised object-centric learning in video: semantics meets temporal correspondence.

Names load on first use, so that a data worker or `smtc --help` does not pay for the model.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "smtc.config",
    "UserError": "smtc.errors",
    "SMTC": "smtc.model",
    "Output": "smtc.model",
    "load_model": "smtc.weights",
    "segment": "smtc.inference",
    "train": "smtc.training.trainer",
    "Run": "smtc.training.trainer",
}
_MODULES = ("benchmarks", "evaluation", "kernels", "objectives", "pipelines", "presets", "training")

__all__ = [
    "SMTC",
    "Config",
    "Output",
    "Run",
    "UserError",
    "load_model",
    "segment",
    "train",
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"smtc.{name}")
    raise AttributeError(f"module 'smtc' has no attribute {name!r}")
