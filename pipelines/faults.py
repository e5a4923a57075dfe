"""What every loader does about files that cannot be read: replace, report, count, stop in time."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.clips import Clip, ClipSampler
from smtc.pipelines.images import BadFrame

_LOG = logging.getLogger("smtc")
ATTEMPTS = 100
"""Replacements tried for one clip."""
_JUDGED_FROM = 20  # clips drawn before the share of bad ones means something

Content = TypeVar("Content")


def first_readable(
    sampler: ClipSampler, index: int, read: Callable[[Clip], Content]
) -> tuple[tuple[Clip, Content] | None, list[BadFrame]]:
    """The clip of sample `index`, or its first replacement that `read` accepts, and what it gave.

    `read` refuses a clip by raising `BadFrame`. Also returns the errors met on the way; None in
    place of the clip after as many replacements as are tried.
    """
    errors: list[BadFrame] = []
    for attempt in range(ATTEMPTS + 1):
        clip = sampler.clip(index, attempt)
        try:
            return (clip, read(clip)), errors
        except BadFrame as error:
            errors.append(error)
    return None, errors


class Faults:
    """The bad files that a loader has met and the clips that were replaced because of them.

    A bad file is printed once, as `<video>/<frame file>: <reason>`, and appended once to `log`, a
    file of JSON lines, when one is given.
    """

    def __init__(self, config: DataConfig, log: Path | None = None) -> None:
        self._config, self._log = config, log
        self.drawn = 0
        """Clips delivered."""
        self.replaced = 0
        """How many of them took the place of a clip with an unreadable file."""
        self.bad_files: dict[str, str] = {}
        """Path to message of the unreadable files met."""
        self._recorded = set() if log is None else {line["file"] for line in read_bad_files(log)}

    def report(self, step: int, files: Iterable[tuple[str, str]]) -> None:
        """Say and record which files (path, message) were found to be bad for `step`."""
        for path, message in files:
            if path in self.bad_files:
                continue
            self.bad_files[path] = message
            _LOG.warning("%s", message)
            if self._log is not None and path not in self._recorded:
                self._recorded.add(path)
                line = json.dumps({"step": step, "file": path, "message": message})
                with self._log.open("a", encoding="utf-8") as log:
                    log.write(line + "\n")

    def count(self, drawn: int, replaced: int) -> None:
        """Add a batch. `UserError` when more clips were replaced than the settings allow."""
        self.drawn += drawn
        self.replaced += replaced
        self._judge()

    def finish(self) -> None:
        """Judge a run too short to be judged on its way."""
        self._judge(at_end=True)

    def none_readable(self) -> UserError:
        """What to raise where `first_readable` found nothing."""
        last = list(self.bad_files.values())[-1]
        return UserError(
            f"No readable clip was found in {ATTEMPTS} attempts ({last}); "
            f"check the files under {self._config.root}."
        )

    def _judge(self, *, at_end: bool = False) -> None:
        if self.drawn < _JUDGED_FROM and not at_end:
            return
        if self.replaced <= self._config.max_bad_share * self.drawn:
            return
        raise UserError(
            f"{self.replaced / self.drawn:.0%} of the clips drawn had unreadable files, more than "
            f"data.max-bad-share ({self._config.max_bad_share:.0%}) allows; one is "
            f"{next(iter(self.bad_files.values()))}. Mend or remove such files, or raise the limit."
        )


def read_bad_files(log: Path) -> list[dict[str, Any]]:
    """The lines of a record of bad files; a line that a killed run cut off is left out."""
    lines = []
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "file" in line:
            lines.append(line)
    return lines
