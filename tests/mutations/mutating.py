"""A pytest plugin that imports one kernel file with a fault in it.

`SMTC_MUTATION` names a JSON file: the operation, the source line to replace and its replacement.
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
    """Finds `smtc.kernels.<op>` in a copy with the fault."""

    def __init__(self, op: str, old: str, new: str, copy: Path) -> None:
        source = (FOLDER / f"{op}.py").read_text(encoding="utf-8")
        if source.count(old) < 1:
            raise ValueError(f"kernels/{op}.py has no {old!r}: adapt the table of mutations")
        copy.write_text(source.replace(old, new), encoding="utf-8")
        self.name, self.copy = f"smtc.kernels.{op}", copy

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.copy)


mutation = json.loads(Path(os.environ["SMTC_MUTATION"]).read_text(encoding="utf-8"))
mutation["copy"] = Path(mutation["copy"])
sys.meta_path.insert(0, FaultyFile(**mutation))
