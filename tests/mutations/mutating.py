"""A pytest plugin that imports one kernel file with a fault in it.

`SMTC_MUTATION` names a JSON file: the kernel file's name, the source to replace, its replacement,
and where the faulty copy goes.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent.parent / "kernels"


class FaultyFile(importlib.abc.MetaPathFinder):
    """Finds `smtc.kernels.<name>` in a copy with the fault."""

    def __init__(self, name: str, old: str, new: str, copy: Path) -> None:
        source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        if source.count(old) < 1:
            raise ValueError(f"kernels/{name}.py has no {old!r}: adapt the table of mutations")
        copy.write_text(source.replace(old, new), encoding="utf-8")
        self.name, self.copy = f"smtc.kernels.{name}", copy

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.copy)


mutation = json.loads(Path(os.environ["SMTC_MUTATION"]).read_text(encoding="utf-8"))
mutation["copy"] = Path(mutation["copy"])
sys.meta_path.insert(0, FaultyFile(**mutation))
