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
    if given is not None:
        folder, remedy = Path(given), "choose a place outside"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "smtc" / hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
        remedy = "name a place outside (--output of smtc data, --data.cache of smtc train)"
    if folder.resolve().is_relative_to(resolved):
        raise UserError(f"{folder} lies inside the data folder {root}; {remedy}.")
    return folder
