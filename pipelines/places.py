"""Where what we know of a data folder is kept: never in the folder itself."""

import hashlib
import os
from pathlib import Path

from smtc.errors import UserError


def cache_folder(root: str | Path, given: str | Path | None = None) -> Path:
    """The folder for the manifest and the packed frames of the data folder `root`.

    `given` when there is one, else `$XDG_CACHE_HOME/smtc/<hash of the resolved root>` (by default
    under `~/.cache`). A place inside `root` is a `UserError`.
    """
    resolved = Path(root).resolve()
    if given is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        name = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
        return Path(base) / "smtc" / name
    if Path(given).resolve().is_relative_to(resolved):
        raise UserError(f"{given} lies inside the data folder {root}; choose a place outside.")
    return Path(given)
