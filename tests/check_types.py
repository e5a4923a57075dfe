"""Run mypy over the package as it is imported: the folders laid out under one name, in build/types.

mypy cannot follow setup.py's mapping of top-level folders into `smtc`, so it is given a copy of
the mapped tree.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPING = {"kernels": "kernels", "pipelines": "pipelines", "benchmarks": "benchmarks"}


def main() -> int:
    """mypy's exit status."""
    tree = ROOT / "build" / "types"
    package = tree / "smtc"
    shutil.rmtree(tree, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "smtc", package, ignore=skipped)
    for folder, name in MAPPING.items():
        shutil.copytree(ROOT / folder, package / name, ignore=skipped)
    # One cache beside the copy, so that unchanged modules are not checked again.
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), "-p", "smtc"]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
